"""The daemon of a test, seen through the C library."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import threading
from collections.abc import Iterator

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


@contextlib.contextmanager
def slow_daemon() -> Iterator[None]:
    """Gives the daemon a millisecond of every 20: whatever the drive, training overtakes it."""
    pid = daemon_pid()
    assert pid is not None
    ended = threading.Event()

    def hold_up(daemon: int) -> None:
        # A test may kill it.
        with contextlib.suppress(ProcessLookupError):
            while not ended.wait(0.001):
                signal.pidfd_send_signal(daemon, signal.SIGSTOP)
                ended.wait(0.019)
                signal.pidfd_send_signal(daemon, signal.SIGCONT)

    with os.fdopen(os.pidfd_open(pid)) as daemon:
        thread = threading.Thread(target=hold_up, args=(daemon.fileno(),))
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
