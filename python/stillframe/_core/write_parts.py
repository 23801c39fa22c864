"""Writing a directory of parts without a daemon: sf_model_write()."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Sequence
from ctypes import byref

from stillframe._core import library
from stillframe._core.layout import CLayout, PartSpec
from stillframe.errors import error_from_code


def write_parts(
    path: str,
    parts: Sequence[PartSpec],
    sources: ctypes.Array[library.Source],
    state_json: bytes,
    *,
    framework: str,
    has_pickle: bool = False,
) -> None:
    """Write a directory of parts; see client/libstillframe.h.

    Args:
        path: the directory; one of ours that is there already is replaced at once.
        parts: the layout.
        sources: where the tensors' bytes are, in the layout's order; the caller keeps them alive.
        state_json: state.json, UTF-8.
        framework: such as "torch 2.13.0", for the manifest.
        has_pickle: whether state_json has pickles in it.

    Raises:
        InvalidArgument: something else is at `path`, or a name is not allowed.
        ResourceExhausted: the disk is full.
        DataLoss: a tensor changed meanwhile.
        Unavailable: the drive failed, or there is no library.
    """
    layout = CLayout(parts)
    options = library.WriteOptions(
        struct_bytes=ctypes.sizeof(library.WriteOptions),
        has_pickle=has_pickle,
        path=os.fsencode(path),
        state_json=state_json,
        state_bytes=len(state_json),
        framework=framework.encode(),
        python_version=platform.python_version().encode(),
    )
    error = library.Error()
    code = library.loaded().sf_model_write(
        byref(options), layout.parts, layout.count, sources, len(sources), byref(error)
    )
    check(code, error)


def check(code: int, error: library.Error) -> None:
    """Raise what a call of the library has failed with."""
    if code != library.OK:
        raise error_from_code(
            code, error.message.decode(errors="replace") or "no message", error.native
        )
