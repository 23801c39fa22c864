"""Memory of tensors that are about to be filled, or that are a file."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os

import torch
from torch import Tensor

from stillframe._core.layout import TensorSpec
from stillframe._core.saved import SavedCheckpoint
from stillframe._torch.tensors import torch_dtype
from stillframe.errors import DataLoss, NotFound

_HUGE_BYTES = 2 << 20
_MADV_HUGEPAGE = 14


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def prefer_huge_pages(tensor: Tensor) -> None:
    """Ask for 2 MiB pages below a tensor that nobody has written yet.

    To fault a GiB in by 4 KiB pages takes longer than to copy it. A wish: what the system refuses
    stays as it is.
    """
    storage = tensor.untyped_storage()
    if storage.nbytes() < 2 * _HUGE_BYTES:
        return
    page_bytes = mmap.PAGESIZE
    begin = -(-storage.data_ptr() // page_bytes) * page_bytes
    end = (storage.data_ptr() + storage.nbytes()) // page_bytes * page_bytes
    _libc().madvise(begin, end - begin, _MADV_HUGEPAGE)


class MappedPart:
    """One part of a checkpoint, mapped privately: what is written to its tensors stays here."""

    def __init__(self, path: str, saved: SavedCheckpoint, part_index: int) -> None:
        """Map the file.

        Raises:
            NotFound: it is gone.
            DataLoss: its length is not what was opened.
        """
        self._offsets = saved.data_offsets(part_index)
        try:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size != saved.manifest["parts"][part_index]["bytes"]:
                    raise DataLoss(f"{path} has another length than when it was opened")
                self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError as error:
            raise NotFound(f"{path}: {error}") from error
        self._data_begin = 8 + int.from_bytes(self._memory[:8], "little")

    def tensor(self, spec: TensorSpec) -> Tensor:
        """The tensor as it is stored; it keeps the mapping."""
        dtype = torch_dtype(spec.dtype)
        count = math.prod(spec.shape)
        if count == 0:
            return torch.empty(spec.shape, dtype=dtype)
        begin = self._data_begin + self._offsets[spec.name]
        if begin % dtype.itemsize:
            # Other writers pack as they like.
            raw = self._memory[begin : begin + count * dtype.itemsize]
            return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(spec.shape)
        mapped = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=begin)
        return mapped.reshape(spec.shape)
