"""Which tensors a model holds, under which names, and where they live.

Names are the framework's (`state_dict()` of the bare model). What wrappers put in front is taken
off by the wrapper's type, so that a run saved under torch.compile or DDP restores without them.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillframe._core import library
from stillframe._core.layout import TensorSpec
from stillframe.errors import InvalidArgument

# Wrapper types, by the module that defines them, and the child that holds the wrapped module. Taken
# from sys.modules: a type whose module was never imported has no instances, and the imports are
# slow.
_WRAPPERS: tuple[tuple[str, str, str], ...] = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.optim.swa_utils", "AveragedModel", "module"),
    (
        "torch.distributed.fsdp.fully_sharded_data_parallel",
        "FullyShardedDataParallel",
        "_fsdp_wrapped_module",
    ),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "CheckpointWrapper",
        "_checkpoint_wrapped_module",
    ),
)

_DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float64: "F64",
    torch.complex64: "C64",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}

Container = dict[str, Any]


@dataclasses.dataclass
class ModelTensors:
    """The tensors of one or several models.

    Attributes:
        tensors: by name; tied ones once, under the name that comes first.
        aliases: the other names of tied tensors, and whose they are.
        names: by id() of every tensor object, tied ones included.
        stateful: modules with a get_extra_state() of their own, by name.
        containers: the dicts that were walked: unchanged contents mean an unchanged model.
    """

    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)
    names: dict[int, str] = dataclasses.field(default_factory=dict)
    stateful: dict[str, nn.Module] = dataclasses.field(default_factory=dict)
    containers: list[Container] = dataclasses.field(default_factory=list)

    def canonical(self, name: str) -> str:
        """The one name under which a tied tensor is kept."""
        return self.aliases.get(name, name)


def collect_models(
    models: Mapping[str | None, nn.Module],
    plain: Callable[[str, Tensor], Tensor] | None = None,
) -> ModelTensors:
    """Walk the models; with more than one, names begin with the model's own name.

    Args:
        models: by name.
        plain: gives the tensor behind a named one, sharing its memory, or refuses it; as
            local_tensor() by default.

    Raises:
        InvalidArgument: a tensor cannot be saved, or a module keeps its state in its own way.
    """
    found = ModelTensors()
    seen: dict[tuple[object, ...], str] = {}
    for model_name, model in models.items():
        prefix = "" if model_name is None else f"{model_name}."
        for name, module in _walk(model, prefix):
            _check_module(name, module)
            found.containers += [module._parameters, module._buffers, module._modules]
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                found.stateful[f"{name}_extra_state"] = module
            for key, tensor in _own_tensors(module):
                full = f"{name}{key}"
                memory = (plain or local_tensor)(full, tensor)
                _add(found, seen, full, tensor, memory)
    return found


def model_slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every place of the model's state: its name, the module with it, its key there, the tensor.

    A tied tensor comes once for each of its names.
    """
    for name, module in _walk(model, ""):
        for key, tensor in _own_tensors(module):
            yield f"{name}{key}", module, key, tensor


def bare_model(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile, DDP and the like."""
    while (wrapped := _wrapped_child(model)) is not None:
        child = model._modules[wrapped]
        assert child is not None
        model = child
    return model


def collect_ema(ema: Mapping[str | None, nn.Module]) -> ModelTensors:
    """Walk modules beside the models; all names begin with `ema.`, as their part's do."""
    return collect_models(
        {"ema" if name is None else f"ema.{name}": module for name, module in ema.items()}
    )


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    yield prefix, module
    wrapped = _wrapped_child(module)
    for key, child in module._modules.items():
        if child is not None:
            yield from _walk(child, prefix if key == wrapped else f"{prefix}{key}.")


def _wrapped_child(module: nn.Module) -> str | None:
    for module_name, type_name, child in _WRAPPERS:
        defined = sys.modules.get(module_name)
        kind = getattr(defined, type_name, None)
        if kind is not None and isinstance(module, kind):
            return child
    return None


def _check_module(name: str, module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise InvalidArgument(f"{name or 'the model'} is a ScriptModule; pass the nn.Module")
    own = type(module)._save_to_state_dict is not nn.Module._save_to_state_dict
    # Lazy modules of torch become plain ones at their first forward.
    if own and not isinstance(module, nn.modules.lazy.LazyModuleMixin):
        raise InvalidArgument(
            f"{name or 'the model'} ({type(module).__qualname__}) writes its state_dict() in its "
            "own way, which this version cannot save; pass such state as extra="
        )


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for key, parameter in module._parameters.items():
        if parameter is not None:
            yield key, parameter
    for key, buffer in module._buffers.items():
        if buffer is not None and key not in module._non_persistent_buffers_set:
            yield key, buffer


def _add(
    found: ModelTensors,
    seen: dict[tuple[object, ...], str],
    name: str,
    tensor: Tensor,
    memory: Tensor,
) -> None:
    first = seen.setdefault(_identity(tensor, memory), name)
    found.names[id(tensor)] = first
    if first == name:
        found.tensors[name] = tensor
    else:
        found.aliases[name] = first


def _identity(tensor: Tensor, memory: Tensor) -> tuple[object, ...]:
    """Equal for tied tensors: the same memory, seen in the same way."""
    if memory.numel() == 0:
        return (id(tensor),)
    return (memory.data_ptr(), memory.dtype, memory.shape, memory.stride())


def local_tensor(name: str, tensor: Tensor) -> Tensor:
    """The plain tensor behind `tensor`, of the CPU or a GPU, sharing its memory.

    Raises:
        InvalidArgument: there is none that this version can save; the message names the tensor.
    """
    # By type: isinstance() of an nn.Parameter takes microseconds.
    if type(tensor) not in _PLAIN_TENSORS:
        tensor = _local_of_subclass(name, tensor)
    if tensor.is_meta:
        raise InvalidArgument(
            f"{name} is on the meta device, which holds no bytes; give it memory before, such as "
            "by model.to_empty(device=...)"
        )
    if tensor.device.type not in ("cpu", "cuda"):
        raise InvalidArgument(
            f"{name} is on {tensor.device}; only tensors of the CPU and of CUDA GPUs are taken"
        )
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise InvalidArgument(f"{name} is not a plain strided tensor ({tensor.layout})")
    if tensor.dtype not in _DTYPE_NAMES:
        raise InvalidArgument(
            f"{name} is {tensor.dtype}, which safetensors cannot hold; save a view of it, such as "
            "torch.view_as_real()"
        )
    if tensor.is_conj() or tensor.is_neg():
        raise InvalidArgument(f"{name} is a conjugated or negated view; call resolve_conj()")
    return tensor


_PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)


def _local_of_subclass(name: str, tensor: Tensor) -> Tensor:
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        raise InvalidArgument(f"{name} has no shape yet; run the model once before")
    if is_dtensor(tensor):
        ranks = tensor.device_mesh.size()  # type: ignore[attr-defined]
        if ranks == 1:
            local = tensor._local_tensor  # type: ignore[attr-defined]
            return local_tensor(name, local)
        raise InvalidArgument(f"{name} is spread over {ranks} ranks: this version serves one")
    if hasattr(type(tensor), "__tensor_flatten__"):
        raise InvalidArgument(f"{name} is a {type(tensor).__qualname__}, which is no plain tensor")
    return tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a torch.distributed DTensor."""
    defined = sys.modules.get("torch.distributed.tensor")
    kind = getattr(defined, "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    """A tensor's line in the layout; `tensor` is a local_tensor()."""
    return TensorSpec(name, _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that a safetensors header names."""
    return _DTYPES[name]


def stride_bytes(tensor: Tensor) -> list[int] | None:
    """Strides in bytes; None for a contiguous tensor."""
    if tensor.is_contiguous():
        return None
    element_bytes = tensor.element_size()
    return [element_bytes * stride for stride in tensor.stride()]


def memory_kind(tensor: Tensor) -> int:
    """Of a local_tensor(), for the C library: whose memory it is."""
    return library.MEMORY_CUDA if tensor.is_cuda else library.MEMORY_HOST


def parameter_names(
    models: ModelTensors, optimizer: torch.optim.Optimizer
) -> list[tuple[str, Tensor]]:
    """The optimizer's parameters and their names, group by group.

    A parameter that no given model owns is called `#<group>.<index>`.
    """
    return [
        (models.names.get(id(parameter), f"#{group_index}.{index}"), parameter)
        for group_index, group in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(group["params"])
    ]


def check_name(kind: str, name: str) -> None:
    """Refuse a name that cannot begin a tensor's name.

    Raises:
        InvalidArgument: it is empty, too long, or has other characters than A-Za-z0-9._-.
    """
    allowed = all(char.isascii() and (char.isalnum() or char in "._-") for char in name)
    if not allowed or name in ("", ".", "..") or len(name) > 128:
        raise InvalidArgument(
            f"the {kind} name {name!r} must be 1 to 128 of A-Z a-z 0-9 . _ - and not '.' or '..'"
        )
