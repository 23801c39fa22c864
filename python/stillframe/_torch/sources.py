"""The memory of a save, as the C library takes it: one sf_source per tensor of the layout."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from stillframe._core import library
from stillframe._torch.live import LiveTensor
from stillframe._torch.tensors import memory_kind, stride_bytes


class Sources:
    """An array of sf_source, filled once; only what lies in `extra` is filled at each save."""

    def __init__(self, tensors: Sequence[LiveTensor], extra_count: int) -> None:
        self._base_count = len(tensors)
        self._kept: list[object] = []
        self.array = (library.Source * (len(tensors) + extra_count))()
        for source, tensor in zip(self.array, tensors, strict=False):
            self._fill(source, tensor.memory, self._kept)
            source.lazy = tensor.is_lazy

    def set_extra(self, tensors: Sequence[Tensor]) -> None:
        """Point the last sources at these; they are copied before save() returns."""
        self._extra_kept: list[object] = list(tensors)
        for index, tensor in enumerate(tensors, start=self._base_count):
            self._fill(self.array[index], tensor, self._extra_kept)

    @property
    def extra_count(self) -> int:
        """How many sources set_extra() fills."""
        return len(self.array) - self._base_count

    @staticmethod
    def _fill(source: library.Source, tensor: Tensor, kept: list[object]) -> None:
        source.data = tensor.data_ptr()
        source.memory = memory_kind(tensor)
        strides = stride_bytes(tensor)
        if strides is None:
            source.stride_bytes = None
            return
        array = (ctypes.c_int64 * len(strides))(*strides)
        kept.append(array)
        source.stride_bytes = array
