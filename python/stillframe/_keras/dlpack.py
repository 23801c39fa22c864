"""Where the memory of a DLPack capsule lies (dlpack.h of DLPack 0.8, unversioned capsules)."""

from __future__ import annotations

import ctypes
from typing import Any

from stillframe.errors import InvalidArgument

# DLDeviceType: memory that the CPU reads, and a GPU's.
_HOST = frozenset({1, 3})
_CUDA = frozenset({2, 13})


class _Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("index", ctypes.c_int32)]


class _Tensor(ctypes.Structure):
    """DLTensor, which a DLManagedTensor begins with."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("dimension_count", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


def memory_of(capsule: Any) -> tuple[int, int | None]:
    """Address of the first element, and the number of the GPU that holds it; None is the host.

    The capsule is not consumed: its memory lives as long as it does.

    Raises:
        InvalidArgument: the memory is another device's.
    """
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype = ctypes.c_void_p
    get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    tensor = _Tensor.from_address(get_pointer(capsule, b"dltensor"))
    address = (tensor.data or 0) + tensor.byte_offset
    if tensor.device.type in _HOST:
        return address, None
    if tensor.device.type in _CUDA:
        return address, tensor.device.index
    raise InvalidArgument(
        f"a tensor lies on a device of DLPack's type {tensor.device.type}, which no lane reads; "
        "move it to the CPU first"
    )
