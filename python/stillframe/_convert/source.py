"""A checkpoint to convert: its tensors as views of the mapped part files, checked on the way.

Nothing is copied: the memory is the page cache. A thread compares every extent with its hash while
the tensors are being written elsewhere; `finish()` says whether all of them were right, and only
then may the result get its name.

PyTorch is imported when the tensors are first asked for: that takes longer than to read and check
the first gigabyte, which the thread does meanwhile.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import mmap
import os
import threading
from collections.abc import Callable
from ctypes import byref
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from stillframe._core import library
from stillframe._core.layout import DTYPES
from stillframe.errors import DataLoss, InvalidArgument, error_from_code

if TYPE_CHECKING:
    from torch import Tensor

_WINDOW_BYTES = 8 * 2**20
# How far the checking may be ahead of the writing: it reads for both, and what it reads must still
# be in memory when it is written.
_LEAD_BYTES = 2**30


class ExportSource:
    """One committed checkpoint, mapped.

    Attributes:
        manifest: manifest.json.
        state: state.json, still typed JSON.
        metadata: each part's safetensors metadata.
        bytes: of all parts.
        progress: called with the bytes of each wrote().
    """

    def __init__(self, run: str, sequence: int, *, only: frozenset[str] | None) -> None:
        """Open and check all but the tensors.

        Args:
            run: directory of the run.
            sequence: which checkpoint.
            only: names of the parts to map; None maps all.

        Raises:
            NotFound: no such checkpoint.
            DataLoss: it is damaged; the message says where.
        """
        self._library = library.loaded()
        self._library.sf_checkpoint_check.argtypes = [
            ctypes.c_void_p,
            ctypes.c_uint64,
            ctypes.c_uint64,
            ctypes.c_void_p,
            ctypes.c_uint64,
            ctypes.POINTER(library.Error),
        ]
        handle = ctypes.c_void_p()
        error = library.Error()
        code = self._library.sf_checkpoint_open(
            os.fsencode(run), str(sequence).encode(), None, byref(handle), byref(error)
        )
        _check(code, error)
        self._handle: int | None = handle.value
        self._maps: list[tuple[int, mmap.mmap]] = []
        self._headers: dict[str, tuple[mmap.mmap, dict[str, Any]]] = {}
        self.progress: Callable[[int], None] | None = None
        self._done = threading.Condition()
        self._written_bytes = 0
        self._is_stopped = False
        self._error: BaseException | None = None
        self.metadata: dict[str, dict[str, str]] = {}
        try:
            self.manifest: dict[str, Any] = json.loads(
                self._library.sf_checkpoint_manifest(self._handle)
            )
            size = ctypes.c_uint64()
            text = self._library.sf_checkpoint_state(self._handle, byref(size))
            self.state: dict[str, Any] = json.loads(ctypes.string_at(text or 0, size.value))
            directory = _directory_of(run, self.manifest)
            for index, part in enumerate(self.manifest["parts"]):
                name = part["file"].removesuffix(".safetensors")
                if only is None or name in only:
                    self._map_part(index, name, directory / part["file"], part["bytes"])
        except BaseException:
            self._close()
            raise
        self.bytes = sum(len(mapped) for _, mapped in self._maps)
        self._checker = threading.Thread(target=self._check_all, name="stillframe-check")

    def __enter__(self) -> ExportSource:
        self._checker.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._done:
            self._is_stopped = True
            self._done.notify_all()
        self._checker.join()
        self._close()

    @functools.cached_property
    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by part name and tensor name; not to be written, nor used after the source."""
        return {
            name: {
                key: _view(mapped, entry["dtype"], entry["shape"], entry["data_offsets"][0])
                for key, entry in header.items()
            }
            for name, (mapped, header) in self._headers.items()
        }

    def wrote(self, count: int) -> None:
        """So many bytes more have been written elsewhere."""
        if self.progress is not None:
            self.progress(count)
        with self._done:
            self._written_bytes += count
            self._done.notify_all()

    def finish(self) -> None:
        """Wait until every extent was compared with its hash.

        Raises:
            DataLoss: one differs; what was written is to be discarded.
        """
        with self._done:
            self._written_bytes += self.bytes
            self._done.notify_all()
        self._checker.join()
        if self._error is not None:
            raise self._error

    def _map_part(self, index: int, name: str, path: Path, size: int) -> None:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            # Private and writable only because torch warns of memory that is not: nobody writes.
            mapped = mmap.mmap(file, size, access=mmap.ACCESS_COPY)
        finally:
            os.close(file)
        self._maps.append((index, mapped))
        header = json.loads(self._library.sf_checkpoint_header(self._handle, index))
        self.metadata[name] = header.pop("__metadata__", {})
        self._headers[name] = (mapped, header)

    def _check_all(self) -> None:
        try:
            checked = 0
            for index, mapped in self._maps:
                address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
                for offset in range(0, len(mapped), _WINDOW_BYTES):
                    with self._done:
                        self._done.wait_for(
                            lambda ahead=checked: (  # type: ignore[misc]
                                self._is_stopped or ahead <= self._written_bytes + _LEAD_BYTES
                            )
                        )
                        if self._is_stopped:
                            return
                    _read_ahead(mapped, offset + _WINDOW_BYTES)
                    size = min(_WINDOW_BYTES, len(mapped) - offset)
                    error = library.Error()
                    code = self._library.sf_checkpoint_check(
                        self._handle, index, offset, address + offset, size, byref(error)
                    )
                    _check(code, error)
                    checked += size
        except BaseException as error:
            self._error = error

    def _close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._library.sf_checkpoint_close(handle)


def _view(mapped: mmap.mmap, dtype_name: str, shape: list[int], offset: int) -> Tensor:
    import torch

    from stillframe._torch.tensors import torch_dtype

    begin = 8 + int.from_bytes(mapped[:8], "little")
    dtype = torch_dtype(dtype_name)
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    assert DTYPES[dtype_name][1] == dtype.itemsize
    # Each has a storage of its own, which torch.save() then writes as such.
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=begin + offset).reshape(shape)


def _read_ahead(mapped: mmap.mmap, offset: int) -> None:
    if offset < len(mapped):
        size = min(2 * _WINDOW_BYTES, len(mapped) - offset)
        mapped.madvise(mmap.MADV_WILLNEED, offset, size)


def _directory_of(run: str, manifest: dict[str, Any]) -> Path:
    if manifest["world_size"] != 1:
        raise InvalidArgument(f"a checkpoint of {manifest['world_size']} ranks is not converted")
    name = f"{manifest['sequence']:08d}-step-{manifest['step']}"
    return Path(run) / name


def _check(code: int, error: library.Error) -> None:
    if code != library.OK:
        raise error_from_code(
            code, error.message.decode(errors="replace") or "no message", error.native
        )


def as_data_loss(what: str, error: Exception) -> DataLoss:
    """What a damaged file makes a library say, as this package's error."""
    first_line = str(error).split("\n", 1)[0]
    return DataLoss(f"{what}: {first_line or type(error).__name__}")
