"""Values of Keras variables as memory, and back, for each backend of Keras.

pin() gives a variable's value at one moment without copying it where the backend allows that;
assign() gives a variable the bytes of a buffer that was made for it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from stillframe._core.layout import DTYPES, TensorSpec
from stillframe._keras.dlpack import memory_of
from stillframe.errors import InvalidArgument

# Keras's names of dtypes, and those of docs/FORMAT.md section 2.
_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "int64": "I64",
    "uint64": "U64",
    "float64": "F64",
    "complex64": "C64",
}
_KERAS_DTYPES = {ours: theirs for theirs, ours in _DTYPES.items()}
# What Python's buffers have no letter for travels as integers of the same size.
_CARRIERS = {1: np.uint8, 2: np.uint16}
_UNBUFFERED = frozenset({"BF16", "F8_E4M3", "F8_E5M2"})
# TensorFlow takes memory of others without a copy from this alignment on.
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """A variable's value: contiguous bytes in row-major order.

    Attributes:
        address: of the first byte; 0 for an empty one.
        owner: keeps the memory alive. Nothing writes it while `owner` lives if `is_frozen`, else
            only until the variable is assigned again.
        is_frozen: see owner.
        device: the number of the GPU whose memory it is; None: the host's.
    """

    address: int
    owner: Any
    is_frozen: bool
    device: int | None = None


def spec_of(name: str, variable: Any) -> TensorSpec:
    """Name, dtype and shape of a Keras variable, tf.Variable or NumPy array.

    Raises:
        InvalidArgument: its dtype has no form in a checkpoint (strings, resources).
    """
    dtype = str(getattr(variable.dtype, "name", variable.dtype))
    if dtype not in _DTYPES:
        raise InvalidArgument(
            f"{name} has dtype {dtype}, which has no form in a checkpoint; of strings and "
            "resources save what they are made from"
        )
    return TensorSpec(name, _DTYPES[dtype], tuple(int(size) for size in variable.shape))


def pin(variable: Any, spec: TensorSpec, *, on_host: bool = False) -> Value:
    """The value that `variable` (of spec_of()) has now.

    On TensorFlow one of a GPU stays there, unless it is wanted `on_host`; the other backends copy
    it to the host.
    """
    if isinstance(variable, (np.ndarray, np.generic)):
        return _of_array(np.ascontiguousarray(variable))
    # A Keras variable wraps the backend's own.
    inner = variable.value if isinstance(variable, keras.Variable) else variable
    backend = keras.backend.backend()
    if backend == "torch":
        tensor = inner.detach().cpu().contiguous()
        return Value(tensor.data_ptr(), tensor, is_frozen=False)
    if backend == "tensorflow" or hasattr(inner, "read_value"):
        return _of_tensorflow(inner, spec, on_host=on_host)
    array = np.asarray(inner)
    return _of_array(array.view(_CARRIERS[array.itemsize]) if spec.dtype in _UNBUFFERED else array)


def byte_count(spec: TensorSpec) -> int:
    """Of one value."""
    return DTYPES[spec.dtype][1] * math.prod(spec.shape)


def new_buffer(spec: TensorSpec) -> npt.NDArray[np.uint8]:
    """Memory for one value: flat bytes, aligned for assign()."""
    count = byte_count(spec)
    raw = np.empty(count + _ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % _ALIGNMENT
    return raw[begin : begin + count]


def assign(variable: Any, spec: TensorSpec, buffer: npt.NDArray[np.uint8]) -> None:
    """Give `variable` the value in `buffer`, which belongs to it from then on."""
    if keras.backend.backend() == "tensorflow" or not isinstance(variable, keras.Variable):
        variable.assign(tensor_of(spec, buffer))
        return
    variable.assign(as_array(spec, buffer))


def tensor_of(spec: TensorSpec, buffer: npt.NDArray[np.uint8]) -> Any:
    """The buffer as a tf.Tensor of the value's dtype and shape; shares its memory."""
    import tensorflow as tf

    carrier = _CARRIERS[DTYPES[spec.dtype][1]] if spec.dtype in _UNBUFFERED else None
    array = buffer.view(carrier or _KERAS_DTYPES[spec.dtype]).reshape(spec.shape)
    tensor = tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return tensor if carrier is None else tf.bitcast(tensor, _KERAS_DTYPES[spec.dtype])


def as_array(spec: TensorSpec, buffer: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """The buffer as an array of the value's dtype and shape; shares its memory."""
    name = _KERAS_DTYPES[spec.dtype]
    if spec.dtype in _UNBUFFERED:
        import ml_dtypes

        array: npt.NDArray[Any] = buffer.view(getattr(ml_dtypes, name)).reshape(spec.shape)
        return array
    return buffer.view(name).reshape(spec.shape)


def _of_tensorflow(inner: Any, spec: TensorSpec, *, on_host: bool) -> Value:
    """The tensor shares the variable's buffer; a later assignment gets another one."""
    # Of a mirrored variable every replica holds the same; of one that is combined when it is read,
    # such as a metric's sum, only all together hold the value.
    if hasattr(inner, "_primary") and getattr(inner.synchronization, "name", "") != "ON_READ":
        inner = inner._primary
    tensor = inner.read_value() if hasattr(inner, "read_value") else inner
    if spec.dtype in _UNBUFFERED:
        import tensorflow as tf

        tensor = tf.bitcast(tensor, tf.as_dtype(_CARRIERS[DTYPES[spec.dtype][1]]))
    if not on_host and is_on_gpu(tensor):
        capsule = tf_capsule(tensor)
        address, device = memory_of(capsule)
        return Value(address, capsule, is_frozen=True, device=device)
    view = memoryview(tensor)
    return _of_array(np.asarray(view), owner=tensor)


def is_on_gpu(tensor: Any) -> bool:
    """Whether the memory of a tf.Tensor is a GPU's."""
    # Not `device`: what an operation of a GPU makes may lie on the host, as int32 does.
    return ":GPU:" in tensor.backing_device


def tf_capsule(tensor: Any) -> Any:
    """A tf.Tensor as a DLPack capsule that nobody consumes; waits until the GPU has made it."""
    import tensorflow as tf

    return tf.experimental.dlpack.to_dlpack(tensor)


def _of_array(array: npt.NDArray[Any], owner: Any = None) -> Value:
    address = array.__array_interface__["data"][0] if array.nbytes else 0
    return Value(address, (array, owner), is_frozen=True)
