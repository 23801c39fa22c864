"""Writing without a daemon: sf_model_write() and sf_file_write() for tensors."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from ctypes import byref

import torch
from torch import Tensor

from stillframe._core import library
from stillframe._core.layout import CLayout, PartSpec
from stillframe._core.write_parts import check, write_parts
from stillframe._torch.tensors import spec_of, stride_bytes

Metadata = Sequence[tuple[str, str]]


class Part:
    """A part and the CPU tensors in it, by name; they are kept until this is."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor], metadata: Metadata = ()) -> None:
        self.tensors = {key: tensor.cpu() for key, tensor in tensors.items()}
        specs = tuple(spec_of(key, tensor) for key, tensor in self.tensors.items())
        self.spec = PartSpec(name, specs, tuple(metadata))


def write_model(path: str, parts: Sequence[Part], state_json: bytes, *, has_pickle: bool) -> None:
    """Write a directory of parts; raises as write_parts()."""
    sources = _Sources([tensor for part in parts for tensor in part.tensors.values()])
    write_parts(
        path,
        [part.spec for part in parts],
        sources.array,
        state_json,
        framework=f"torch {torch.__version__}",
        has_pickle=has_pickle,
    )


def write_file(path: str, part: Part) -> None:
    """Write one file; see client/libstillframe.h.

    Raises:
        StillframeError: as write_parts().
    """
    layout = CLayout([part.spec])
    sources = _Sources(list(part.tensors.values()))
    options = library.WriteOptions(
        struct_bytes=ctypes.sizeof(library.WriteOptions), path=os.fsencode(path)
    )
    error = library.Error()
    code = library.loaded().sf_file_write(
        byref(options), layout.parts, sources.array, sources.count, byref(error)
    )
    check(code, error)


class _Sources:
    """An array of sf_source over tensors that outlive it."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.count = len(tensors)
        self.array = (library.Source * self.count)()
        self._kept: list[object] = []
        for source, tensor in zip(self.array, tensors, strict=True):
            source.data = tensor.data_ptr()
            strides = stride_bytes(tensor)
            if strides is not None:
                array = (ctypes.c_int64 * len(strides))(*strides)
                self._kept.append(array)
                source.stride_bytes = array
