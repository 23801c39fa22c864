"""The daemon of a test, seen through the C library."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal

from stillframe._core import library


def daemon_pid() -> int | None:
    """The process id of the daemon that runs now; None if none does."""
    functions = library.loaded()
    text = ctypes.c_void_p()
    if functions.sf_daemon_status(None, ctypes.byref(text), None) != library.OK:
        return None
    status = json.loads(ctypes.string_at(text.value or 0))
    functions.sf_free(text)
    return int(status["pid"])


def kill_daemon() -> None:
    """SIGKILL, and wait until it is gone."""
    pid = daemon_pid()
    assert pid is not None
    with os.fdopen(os.pidfd_open(pid)) as gone:
        os.kill(pid, signal.SIGKILL)
        assert select.select([gone], [], [], 20)[0]
