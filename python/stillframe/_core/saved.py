"""A committed checkpoint, open for reading: sf_checkpoint as an object."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from ctypes import byref
from types import NoneType, TracebackType
from typing import Any

from stillframe._core import library
from stillframe._core.layout import DTYPES, PartSpec, TensorSpec
from stillframe._core.session import Session
from stillframe.errors import DataLoss, error_from_code


@dataclasses.dataclass(frozen=True, slots=True)
class SavedTensor:
    """One tensor of a checkpoint."""

    part_index: int
    spec: TensorSpec

    @property
    def bytes(self) -> int:
        """Its size."""
        return DTYPES[self.spec.dtype][1] * math.prod(self.spec.shape)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a saved tensor is to go: memory that outlives the read."""

    saved: SavedTensor
    address: int
    stride_bytes: Sequence[int] | None
    memory: int = library.MEMORY_HOST  # Or of a GPU, which then is contiguous.


class SavedCheckpoint:
    """Owns an sf_checkpoint until close().

    Attributes:
        parts: the layout, as the files' headers tell it.
        tensors: by part name and tensor name.
        state: state.json, still typed JSON.
    """

    def __init__(self, directory: str, selector: str, session: Session | None = None) -> None:
        """Open and check all but the tensors.

        Args:
            directory: a run, or a checkpoint that stands alone.
            selector: such as "latest".
            session: a daemon's, which may have the snapshot in memory still.

        Raises:
            NotFound: no such checkpoint.
            DataLoss: it is damaged; the message says where.
        """
        functions = library.loaded()
        handle = ctypes.c_void_p()
        error = library.Error()
        with _lent(session) as owner:
            code = functions.sf_checkpoint_open(
                os.fsencode(directory), selector.encode(), owner, byref(handle), byref(error)
            )
        _check(code, error)
        self._take(handle, session)

    @classmethod
    def of_file(cls, path: str) -> SavedCheckpoint:
        """Open a safetensors file that stands alone: one part, called "file", and no state.

        Raises:
            NotFound: no such file.
            DataLoss: it is damaged, or no safetensors file.
        """
        self = cls.__new__(cls)
        handle = ctypes.c_void_p()
        error = library.Error()
        code = library.loaded().sf_file_open(os.fsencode(path), byref(handle), byref(error))
        _check(code, error)
        self._take(handle, None)
        return self

    def _take(self, handle: ctypes.c_void_p, session: Session | None) -> None:
        self._library = library.loaded()
        self._session = session
        self._handle: int | None = handle.value
        try:
            self.manifest: dict[str, Any] = json.loads(
                self._library.sf_checkpoint_manifest(self._handle)
            )
            self.state = self._read_state() if self.manifest["states"] else {}
            self.parts = [
                self._read_part(index, part["file"])
                for index, part in enumerate(self.manifest["parts"])
            ]
        except BaseException:
            self.close()
            raise
        self.tensors: dict[str, dict[str, SavedTensor]] = {
            part.name: {spec.name: SavedTensor(index, spec) for spec in part.tensors}
            for index, part in enumerate(self.parts)
        }

    def __enter__(self) -> SavedCheckpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free it; twice is harmless."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._library.sf_checkpoint_close(handle)

    def aliases(self, part_name: str = "model") -> dict[str, str]:
        """The other names of tied tensors in a part, and whose they are."""
        for part in self.parts:
            if part.name == part_name:
                names = self.tensors[part_name]
                return {key: value for key, value in part.metadata if value in names}
        return {}

    def verify(self) -> None:
        """Read everything and compare every hash.

        Raises:
            DataLoss: an extent is damaged; the message names it.
            InvalidArgument: another writer's file, which has no hashes.
        """
        error = library.Error()
        _check(self._library.sf_checkpoint_verify(self._handle, byref(error)), error)

    def data_offsets(self, part_index: int) -> dict[str, int]:
        """Where each tensor of a part begins, in bytes behind the part's header."""
        header = json.loads(self._library.sf_checkpoint_header(self._handle, part_index))
        header.pop("__metadata__", None)
        return {name: entry["data_offsets"][0] for name, entry in header.items()}

    def read(self, places: Sequence[Place]) -> library.ReadStats:
        """Fill the places, each extent checked against its hash.

        Raises:
            DataLoss: an extent is damaged; the places may hold unverified bytes.
        """
        targets = (library.Target * len(places))()
        kept: list[object] = []
        for target, place in zip(targets, places, strict=True):
            target.part_index = place.saved.part_index
            target.name = place.saved.spec.name.encode()
            target.data = place.address
            target.bytes = place.saved.bytes
            target.memory = place.memory
            if place.stride_bytes is not None:
                strides = (ctypes.c_int64 * len(place.stride_bytes))(*place.stride_bytes)
                kept.append(strides)
                target.stride_bytes = strides
        stats = library.ReadStats(struct_bytes=ctypes.sizeof(library.ReadStats))
        error = library.Error()
        with _lent(self._session):
            code = self._library.sf_checkpoint_read(
                self._handle, targets, len(places), byref(stats), byref(error)
            )
        _check(code, error)
        return stats

    def _read_state(self) -> dict[str, Any]:
        size = ctypes.c_uint64()
        address = self._library.sf_checkpoint_state(self._handle, byref(size))
        try:
            state = json.loads(ctypes.string_at(address or 0, size.value))
        except (ValueError, RecursionError) as error:
            raise DataLoss(f"state.json is not JSON: {error}") from error
        if not isinstance(state, dict) or state.get("format_version") != 1:
            raise DataLoss("state.json is not one of this version")
        model, named = state.get("model", {}), state.get("named", [])
        has_form = (
            isinstance(model, dict)
            and isinstance(model.get("extra_state", {}), dict)
            and isinstance(named, list)
            and isinstance(state.get("epoch"), (int, NoneType))
        )
        if not has_form:
            raise DataLoss("state.json: model, named or epoch has another form")
        return state

    def _read_part(self, index: int, file_name: str) -> PartSpec:
        header = json.loads(self._library.sf_checkpoint_header(self._handle, index))
        metadata = header.pop("__metadata__", {})
        tensors = tuple(
            TensorSpec(name, entry["dtype"], tuple(entry["shape"]))
            for name, entry in header.items()
        )
        return PartSpec(
            file_name.removesuffix(".safetensors"), tensors, tuple(sorted(metadata.items()))
        )


def _lent(session: Session | None) -> AbstractContextManager[Any]:
    return nullcontext() if session is None else session.lend_handle()


def _check(code: int, error: library.Error) -> None:
    if code != library.OK:
        raise error_from_code(
            code, error.message.decode(errors="replace") or "no message", error.native
        )
