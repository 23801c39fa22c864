"""Files of torch.save(): written from mapped parts, read where they lie."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillframe._convert.files import Plan, Segment, WindowedWriter
from stillframe._convert.source import ExportSource, as_data_loss
from stillframe._convert.zip_files import check_zip
from stillframe.errors import InvalidArgument, NotFound


def write(source: ExportSource, root: dict[str, Any], target: str) -> list[str]:
    """Write `root` as torch.save() does, durably; returns the file's name."""
    file = WindowedWriter(target, source.wrote)
    try:
        torch.save(root, file)  # type: ignore[arg-type]  # It asks for write() and flush().
        file.sync_and_close()
    finally:
        file.close()
    return [Path(target).name.removesuffix(".partial")]


def read(path: str) -> Any:
    """What the file holds, its tensors mapped.

    Raises:
        NotFound: no such file.
        DataLoss: it is corrupt or truncated.
        InvalidArgument: it holds more than tensors and plain values; it was not unpickled.
    """
    if not os.path.isfile(path):
        raise NotFound(f"{path}: no such file")
    check_zip(path, path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise InvalidArgument(no_pickle(path, error)) from error
    except (RuntimeError, ValueError, KeyError, EOFError) as error:
        raise as_data_loss(f"{path} is not a file of torch.save() that can be mapped", error) from (
            error
        )


def no_pickle(what: str, error: Exception) -> str:
    """Why a file that needs the unpickler is refused."""
    first_line = str(error).split("\n", 1)[0].removesuffix(" ")
    return (
        f"{what} holds objects that only pickle can make ({first_line}); unpickling runs code of "
        "the file, and weights_only=False is not offered here: save tensors and plain values, such "
        "as model.state_dict()"
    )


class MappedFile:
    """Where the tensors of a file that torch.load(mmap=True) has mapped lie in it."""

    def __init__(self, path: str, plan: Plan) -> None:
        self._plan = plan
        self._index = plan.add_file(os.path.abspath(path))
        self._ranges = _mapped_ranges(path)

    def identity(self, tensor: Tensor) -> object:
        """Equal for tensors that are the same bytes."""
        if tensor.numel() == 0 or tensor.is_quantized or tensor.layout is not torch.strided:
            return id(tensor)
        return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())

    def segments(self, tensor: Tensor) -> list[Segment]:
        """The bytes of a tensor, in the order of its elements."""
        if tensor.numel() == 0:
            return []
        address = tensor.data_ptr()
        size = tensor.numel() * tensor.element_size()
        if tensor.is_contiguous():
            for begin, end, offset in self._ranges:
                if begin <= address and address + size <= end:
                    return [(self._index, offset + address - begin, size)]
        return [self._plan.copy_to_scratch(tensor if tensor.dim() else tensor.reshape(1))]


def _mapped_ranges(path: str) -> list[tuple[int, int, int]]:
    """Begin, end and file offset of this process's mappings of the file; see proc(5)."""
    status = os.stat(path)
    wanted = (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
    ranges = []
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            addresses, _, offset, device, inode, *_ = line.split(maxsplit=5)
            begin, end = (int(text, 16) for text in addresses.split("-"))
            major, minor = (int(text, 16) for text in device.split(":"))
            if (major, minor, int(inode)) == wanted:
                ranges.append((begin, end, int(offset, 16)))
    return ranges
