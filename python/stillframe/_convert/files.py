"""Files of a conversion: written in windows with their writeback begun early, and read in place."""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stillframe._torch.tensors import spec_of

_WINDOW_BYTES = 8 * 2**20


class WindowedWriter:
    """A binary file for torch.save(): what it is given in one piece goes out in windows.

    Each window's writeback begins at once, so that the last fsync has little left to do and dirty
    pages stay few. `wrote` is called with the bytes of each.
    """

    def __init__(self, path: str | os.PathLike[str], wrote: Callable[[int], None]) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._wrote = wrote
        self._offset = 0
        self._begun = 0

    def write(self, data: Any) -> int:
        """Write all of it; returns its bytes."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            count = os.write(self._file, view[done : done + _WINDOW_BYTES])
            done += count
            self._offset += count
            self._wrote(count)
            if self._offset - self._begun >= _WINDOW_BYTES:
                self._begin_writeback()
        return done

    def tell(self) -> int:
        """Where the next byte goes."""
        return self._offset

    def flush(self) -> None:
        """Nothing is buffered here."""

    def sync_and_close(self) -> None:
        """Make it durable. An error is final for the file."""
        try:
            os.fsync(self._file)
        finally:
            self.close()

    def close(self) -> None:
        """Without a sync; twice is harmless."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def _begin_writeback(self) -> None:
        # Starts writing these pages, and waits for none; see posix_fadvise(2).
        os.posix_fadvise(
            self._file, self._begun, self._offset - self._begun, os.POSIX_FADV_DONTNEED
        )
        self._begun = self._offset


Segment = tuple[int, int, int]


@dataclasses.dataclass
class Plan:
    """Which bytes of which files make the tensors of a new checkpoint.

    A segment is a file's index (-1 is the scratch file), an offset and a size.
    """

    scratch_fd: int
    files: list[str] = dataclasses.field(default_factory=list)
    _scratch_bytes: int = 0

    def add_file(self, path: str) -> int:
        """The index of a file."""
        if path not in self.files:
            self.files.append(path)
        return self.files.index(path)

    def scratch_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Segment]:
        """Memory of the scratch file for a tensor that lies in no one piece elsewhere."""
        size = math.prod(shape) * dtype.itemsize
        offset = self._scratch_bytes
        self._scratch_bytes += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        os.ftruncate(self.scratch_fd, self._scratch_bytes)
        mapped = mmap.mmap(self.scratch_fd, size, offset=offset)
        tensor = torch.frombuffer(mapped, dtype=dtype).reshape(tuple(shape))
        return tensor, (-1, offset, size)

    def copy_to_scratch(self, tensor: Tensor) -> Segment:
        """A contiguous copy, window by window."""
        target, segment = self.scratch_tensor(tensor.shape, tensor.dtype)
        row_bytes = max(1, tensor.numel() * tensor.element_size() // max(1, tensor.shape[0]))
        rows = max(1, _WINDOW_BYTES // row_bytes)
        for first in range(0, tensor.shape[0], rows):
            target[first : first + rows].copy_(tensor[first : first + rows])
        return segment


def tensor_entry(name: str, tensor: Tensor, segments: Sequence[Segment]) -> dict[str, Any]:
    """A tensor of the plan, as the command reads it."""
    spec = spec_of(name, tensor)
    return {"name": name, "dtype": spec.dtype, "shape": list(spec.shape), "segments": segments}
