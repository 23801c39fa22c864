"""Tensors as whole models and single files hold them: on any device, and of more dtypes.

What safetensors cannot name is stored as something that it can, and the true dtype beside it; or
refused by name.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillframe._core.layout import TensorSpec
from stillframe._torch.tensors import spec_of, torch_dtype
from stillframe.errors import DataLoss, InvalidArgument

# True dtype: the dtype of the elements that stand for one of it, in one more last dimension.
_SPLIT: dict[torch.dtype, torch.dtype] = {torch.complex128: torch.float64}
_SPLIT_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in _SPLIT}


def plain_tensor(name: str, tensor: Tensor) -> Tensor:
    """The tensor that is stored for this one, sharing its memory; on the device where it is.

    Raises:
        InvalidArgument: there is none; the message names the tensor and says what to do.
    """
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        raise InvalidArgument(f"{name} has no shape yet; run the model once before")
    if tensor.device.type == "meta":
        raise InvalidArgument(
            f"{name} is on the meta device: it has no values to save; load or initialise the model "
            "first"
        )
    if tensor.is_quantized:
        raise InvalidArgument(
            f"{name} is quantised ({tensor.dtype}), which safetensors cannot hold; save "
            "int_repr(), q_scale() and q_zero_point(), or dequantize() it"
        )
    if tensor.layout is not torch.strided:
        raise InvalidArgument(f"{name} is a sparse tensor ({tensor.layout}); call to_dense()")
    if hasattr(type(tensor), "__tensor_flatten__"):
        raise InvalidArgument(
            f"{name} is a {type(tensor).__qualname__}, which is no plain tensor; save full or "
            "dequantised tensors instead"
        )
    if tensor.is_conj() or tensor.is_neg():
        raise InvalidArgument(f"{name} is a conjugated or negated view; call resolve_conj()")
    tensor = tensor.detach()
    if tensor.dtype in _SPLIT:
        tensor = torch.view_as_real(tensor)
    if not _has_name(tensor.dtype):
        raise InvalidArgument(f"{name} is {tensor.dtype}, which safetensors cannot hold")
    return tensor


def _has_name(dtype: torch.dtype) -> bool:
    try:
        spec_of("", torch.empty(0, dtype=dtype))
    except (KeyError, RuntimeError):
        return False
    return True


def true_dtype(tensor: Tensor) -> str | None:
    """The dtype to note beside a tensor that is stored as another one; None for the others."""
    return str(tensor.dtype).removeprefix("torch.") if tensor.dtype in _SPLIT else None


def noted_dtype(noted: str) -> torch.dtype:
    """The dtype behind a note of true_dtype().

    Raises:
        DataLoss: there is none.
    """
    found = _SPLIT_NAMES.get(noted)
    if found is None:
        raise DataLoss(f"no tensor of this version is noted as {noted!r}")
    return found


def new_tensor(spec: TensorSpec, noted: str | None, like: Tensor | None = None) -> Tensor:
    """An empty CPU tensor for what was stored; of the strides of `like` where they are dense.

    Raises:
        DataLoss: the note does not fit what was stored.
    """
    if noted is None:
        shape, dtype = spec.shape, torch_dtype(spec.dtype)
    else:
        true = noted_dtype(noted)
        if torch_dtype(spec.dtype) is not _SPLIT[true] or spec.shape[-1:] != (2,):
            raise DataLoss(f"{spec.name} is said to be {noted}, but is {spec.dtype} {spec.shape}")
        shape, dtype = spec.shape[:-1], true
    # channels_last stays channels_last.
    if like is not None and tuple(like.shape) == shape:
        return torch.empty_like(like, dtype=dtype, device="cpu", requires_grad=False)
    return torch.empty(shape, dtype=dtype)


def stored_view(tensor: Tensor) -> Tensor:
    """The view of a new_tensor() that has the stored dtype and shape."""
    return torch.view_as_real(tensor) if tensor.dtype in _SPLIT else tensor


def expose(stored: Tensor, noted: str | None) -> Tensor:
    """What a tensor that was mapped as it is stored truly is, sharing its memory."""
    return stored if noted is None else torch.view_as_complex(stored)
