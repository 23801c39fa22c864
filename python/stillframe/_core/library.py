"""libstillframe.so as ctypes sees it: the structs and functions of client/libstillframe.h.

Only declarations; what they mean is said there. Every call releases the GIL.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import (
    CDLL,
    POINTER,
    Structure,
    c_char,
    c_char_p,
    c_double,
    c_int,
    c_int32,
    c_int64,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path

import stillframe
from stillframe.errors import Unavailable

OK = 0
INVALID_ARGUMENT = 1
RESOURCE_EXHAUSTED = 3
TIMEOUT = 100

CAPTURE_EAGER = 0
CAPTURE_LAZY = 1
MEMORY_HOST, MEMORY_CUDA = 0, 1
MEMORY_HOST = 0
MEMORY_CUDA = 1
CHECK_SAMPLE = 0
CHECK_FULL = 1

STATE_ACCEPTED = 0
STATE_CAPTURED = 1
STATE_DURABLE = 2
STATE_FAILED = 3


class Error(Structure):
    """sf_error."""

    _fields_ = [("code", c_int32), ("native", c_int32), ("message", c_char * 2040)]


class Best(Structure):
    """sf_best."""

    _fields_ = [("metric", c_char_p), ("is_max", c_int32), ("count", c_uint32)]


class AttachOptions(Structure):
    """sf_attach_options."""

    _fields_ = [
        ("struct_bytes", c_uint32),
        ("rank", c_uint32),
        ("world_size", c_uint32),
        ("keep_last", c_uint32),
        ("keep_every", c_uint32),
        ("best_count", c_uint32),
        ("force_filesystem", c_int32),
        ("no_autostart", c_int32),
        ("slot_count", c_uint32),
        ("copier_threads", c_uint32),
        ("timeout_ms", c_uint32),
        ("reserved", c_uint32),
        ("arena_bytes_max", c_uint64),
        ("run_path", c_char_p),
        ("best", POINTER(Best)),
        ("framework", c_char_p),
        ("python_version", c_char_p),
        ("socket_path", c_char_p),
        ("daemon_path", c_char_p),
        ("gpu_window_bytes", c_uint64),
        ("gpu_ring_bytes", c_uint64),
        ("lane", c_char_p),
    ]


class Tensor(Structure):
    """sf_tensor."""

    _fields_ = [
        ("name", c_char_p),
        ("shape", POINTER(c_uint64)),
        ("dimension_count", c_uint32),
        ("dtype", c_uint32),
    ]


class Part(Structure):
    """sf_part."""

    _fields_ = [
        ("name", c_char_p),
        ("tensors", POINTER(Tensor)),
        ("tensor_count", c_uint64),
        ("metadata", POINTER(c_char_p)),
        ("metadata_count", c_uint64),
    ]


class Source(Structure):
    """sf_source."""

    _fields_ = [
        ("data", c_void_p),
        ("stride_bytes", POINTER(c_int64)),
        ("lazy", c_uint32),
        ("memory", c_uint32),
    ]


class Stream(Structure):
    """sf_stream."""

    _fields_ = [("stream", c_void_p), ("device", c_int32), ("reserved", c_uint32)]


class SaveOptions(Structure):
    """sf_save_options."""

    _fields_ = [
        ("struct_bytes", c_uint32),
        ("capture", c_uint32),
        ("check", c_uint32),
        ("has_pickle", c_uint32),
        ("busy_timeout_ms", c_uint32),
        ("metric_count", c_uint32),
        ("step", c_int64),
        ("metric_names", POINTER(c_char_p)),
        ("metric_values", POINTER(c_double)),
        ("state_json", c_char_p),
        ("state_bytes", c_uint64),
        ("streams", POINTER(Stream)),
        ("stream_count", c_uint64),
    ]


class TicketInfo(Structure):
    """sf_ticket."""

    _fields_ = [
        ("struct_bytes", c_uint32),
        ("state", c_int32),
        ("sequence", c_uint64),
        ("step", c_int64),
        ("bytes", c_uint64),
        ("begin_ns", c_int64),
        ("accepted_ns", c_int64),
        ("captured_ns", c_int64),
        ("durable_ns", c_int64),
        ("begin_call_ns", c_int64),
        ("busy_wait_ns", c_int64),
        ("first_save_wait_ns", c_int64),
        ("fence_wait_ns", c_int64),
        ("failure", Error),
    ]


class Target(Structure):
    """sf_target."""

    _fields_ = [
        ("part_index", c_uint64),
        ("name", c_char_p),
        ("data", c_void_p),
        ("bytes", c_uint64),
        ("stride_bytes", POINTER(c_int64)),
        ("memory", c_uint32),
        ("reserved", c_uint32),
    ]


class ReadStats(Structure):
    """sf_read_stats."""

    _fields_ = [
        ("struct_bytes", c_uint32),
        ("from_memory", c_int32),
        ("bytes", c_uint64),
        ("duration_ns", c_int64),
    ]


class WriteOptions(Structure):
    """sf_write_options."""

    _fields_ = [
        ("struct_bytes", c_uint32),
        ("has_pickle", c_uint32),
        ("path", c_char_p),
        ("state_json", c_char_p),
        ("state_bytes", c_uint64),
        ("framework", c_char_p),
        ("python_version", c_char_p),
    ]


_SESSION = c_void_p
_CHECKPOINT = c_void_p
_ERROR = POINTER(Error)

# Texts to be freed are declared c_void_p: ctypes would copy a c_char_p and lose the pointer.
_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "sf_attach": (c_int, [POINTER(AttachOptions), POINTER(_SESSION), _ERROR]),
    "sf_session_warnings": (c_char_p, [_SESSION]),
    "sf_session_describe": (c_int, [_SESSION, POINTER(c_void_p), _ERROR]),
    "sf_session_close": (c_int, [_SESSION, c_uint32, _ERROR]),
    "sf_layout_register": (c_int, [_SESSION, POINTER(Part), c_uint64, c_uint32, _ERROR]),
    "sf_save_begin": (
        c_int,
        [_SESSION, POINTER(SaveOptions), POINTER(Source), c_uint64, POINTER(c_uint64), _ERROR],
    ),
    "sf_capture_fence": (c_int, [_SESSION, c_uint64, c_uint32, _ERROR]),
    "sf_capture_wait": (c_int, [_SESSION, c_uint64, c_uint32, c_int, _ERROR]),
    "sf_capture_publish": (c_int, [_SESSION, c_uint64, _ERROR]),
    "sf_capture_void": (c_int, [_SESSION, c_uint64, c_int, c_char_p, _ERROR]),
    "sf_ticket_get": (c_int, [_SESSION, c_uint64, POINTER(TicketInfo), _ERROR]),
    "sf_ticket_wait": (c_int, [_SESSION, c_uint64, c_int, c_uint32, _ERROR]),
    "sf_session_settle": (c_int, [_SESSION, c_uint32, _ERROR]),
    "sf_checkpoint_remove": (c_int, [_SESSION, c_uint64, c_uint32, _ERROR]),
    "sf_run_list": (c_int, [c_char_p, POINTER(c_void_p), _ERROR]),
    "sf_checkpoint_open": (c_int, [c_char_p, c_char_p, _SESSION, POINTER(_CHECKPOINT), _ERROR]),
    "sf_checkpoint_close": (None, [_CHECKPOINT]),
    "sf_checkpoint_manifest": (c_char_p, [_CHECKPOINT]),
    "sf_checkpoint_state": (c_void_p, [_CHECKPOINT, POINTER(c_uint64)]),
    "sf_checkpoint_header": (c_char_p, [_CHECKPOINT, c_uint64]),
    "sf_checkpoint_read": (
        c_int,
        [_CHECKPOINT, POINTER(Target), c_uint64, POINTER(ReadStats), _ERROR],
    ),
    "sf_file_open": (c_int, [c_char_p, POINTER(_CHECKPOINT), _ERROR]),
    "sf_checkpoint_verify": (c_int, [_CHECKPOINT, _ERROR]),
    "sf_model_write": (
        c_int,
        [POINTER(WriteOptions), POINTER(Part), c_uint64, POINTER(Source), c_uint64, _ERROR],
    ),
    "sf_file_write": (
        c_int,
        [POINTER(WriteOptions), POINTER(Part), POINTER(Source), c_uint64, _ERROR],
    ),
    "sf_daemon_status": (c_int, [c_char_p, POINTER(c_void_p), _ERROR]),
    "sf_free": (None, [c_void_p]),
}


def location() -> Path:
    """Where the library is: $STILLFRAME_LIBRARY, else inside this package."""
    wish = os.environ.get("STILLFRAME_LIBRARY")
    return Path(wish) if wish else Path(__file__).parents[1] / "lib" / "libstillframe.so"


@functools.cache
def loaded() -> CDLL:
    """Load the library once and declare its functions.

    Raises:
        Unavailable: it is not there, cannot be loaded, or belongs to another version.
    """
    path = location()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(
            f"cannot load {path}: {error}; install the stillframe wheel, or set "
            "STILLFRAME_LIBRARY to a built libstillframe.so"
        ) from error
    loaded.sf_version.restype = c_char_p
    loaded.sf_version.argtypes = []
    version = loaded.sf_version().decode()
    if version != stillframe.__version__:
        raise Unavailable(
            f"{path} is version {version}, this package is {stillframe.__version__}; "
            "build and install them together"
        )
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype = result
        function.argtypes = arguments
    return loaded
