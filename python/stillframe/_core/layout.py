"""The layout of a save: which tensors, in which parts; and its form for the C library."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence

from stillframe._core import library
from stillframe.errors import InvalidArgument

# Numbers, names and element sizes of docs/FORMAT.md section 2.
DTYPES: dict[str, tuple[int, int]] = {
    "BOOL": (0, 1),
    "U8": (1, 1),
    "I8": (2, 1),
    "F8_E4M3": (3, 1),
    "F8_E5M2": (4, 1),
    "F8_E4M3FNUZ": (5, 1),
    "F8_E5M2FNUZ": (6, 1),
    "F8_E8M0": (7, 1),
    "I16": (8, 2),
    "U16": (9, 2),
    "F16": (10, 2),
    "BF16": (11, 2),
    "I32": (12, 4),
    "U32": (13, 4),
    "F32": (14, 4),
    "I64": (15, 8),
    "U64": (16, 8),
    "F64": (17, 8),
    "C64": (18, 8),
}


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a part; `dtype` is a name of DTYPES."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def file_order(self) -> tuple[int, bytes]:
        """Sorts as the file does, so that a layout read from a file equals the saved one."""
        return (-DTYPES[self.dtype][1], self.name.encode())


@dataclasses.dataclass(frozen=True, slots=True)
class PartSpec:
    """One part: a safetensors file."""

    name: str
    tensors: tuple[TensorSpec, ...]
    metadata: tuple[tuple[str, str], ...]


class CLayout:
    """An array of sf_part, with all that it points to."""

    def __init__(self, parts: Sequence[PartSpec]) -> None:
        self._kept: list[object] = []
        self.count = len(parts)
        self.parts = (library.Part * len(parts))(*(self._part(part) for part in parts))

    def _part(self, part: PartSpec) -> library.Part:
        tensors = (library.Tensor * len(part.tensors))()
        sizes = [size for tensor in part.tensors for size in tensor.shape]
        shapes = (ctypes.c_uint64 * max(1, len(sizes)))(*sizes)
        offset = 0
        for target, tensor in zip(tensors, part.tensors, strict=True):
            if "\0" in tensor.name:
                raise InvalidArgument(f"the tensor name {tensor.name!r} has a NUL in it")
            target.name = tensor.name.encode()
            if tensor.shape:
                target.shape = ctypes.cast(
                    ctypes.byref(shapes, 8 * offset), ctypes.POINTER(ctypes.c_uint64)
                )
            target.dimension_count = len(tensor.shape)
            target.dtype = DTYPES[tensor.dtype][0]
            offset += len(tensor.shape)
        words = [word.encode() for pair in part.metadata for word in pair]
        metadata = (ctypes.c_char_p * max(1, len(words)))(*words)
        self._kept += [tensors, shapes, metadata]
        return library.Part(
            part.name.encode(), tensors, len(part.tensors), metadata, len(part.metadata)
        )
