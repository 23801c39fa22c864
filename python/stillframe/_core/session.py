"""One (run, rank) attached to a daemon: sf_session as an object.

The C library wants one thread at a time but for three calls; `Session.lock` sees to that, and a
count of users keeps the session alive under those three. Waits come back to Python every 100 ms at
the latest where the library allows it, so that Ctrl-C works.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import byref
from typing import Any

from stillframe._core import library
from stillframe._core.layout import CLayout, PartSpec
from stillframe.errors import Cancelled, InvalidArgument, error_from_code

SLICE_MS = 100
_LAYOUT_TIMEOUT_MS = 10_000
_LAST_CALLS_TIMEOUT = 2.0


@dataclasses.dataclass(frozen=True)
class AttachOptions:
    """What sf_attach() is told; see client/libstillframe.h."""

    directory: str
    rank: int = 0
    world_size: int = 1
    keep_last: int = 0
    keep_every: int = 0
    best: Sequence[tuple[str, str, int]] = ()  # Metric, "min" or "max", how many.
    force_filesystem: bool = False
    arena_bytes_max: int = 0
    framework: str = ""
    python_version: str = ""
    lane: str = "auto"
    gpu_ring_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class SaveRequest:
    """What sf_save_begin() is told; see client/libstillframe.h."""

    step: int
    metrics: Sequence[tuple[str, float]]
    state_json: bytes
    has_pickle: bool
    is_lazy: bool
    checks_all: bool
    busy_timeout_ms: int
    streams: Sequence[tuple[int, int]] = ()  # Of GPUs: device, and its CUstream.


class Session:
    """Owns an sf_session until close()."""

    def __init__(self, options: AttachOptions) -> None:
        """Attach, starting a private daemon if none answers; takes 10 s at most.

        Raises:
            Unavailable: no library, no daemon, or none could be started.
            InvalidArgument: another process writes the run, the directory is not writable, or its
                file system is refused.
        """
        self.lock = threading.RLock()
        self._library = library.loaded()
        self._pid = os.getpid()
        self._users = 0
        self._users_changed = threading.Condition()
        self._handle: int | None = None
        given = library.AttachOptions(
            struct_bytes=ctypes.sizeof(library.AttachOptions),
            rank=options.rank,
            world_size=options.world_size,
            keep_last=options.keep_last,
            keep_every=options.keep_every,
            best_count=len(options.best),
            best=(library.Best * len(options.best))(
                *(
                    library.Best(metric.encode(), mode == "max", count)
                    for metric, mode, count in options.best
                )
            ),
            force_filesystem=options.force_filesystem,
            arena_bytes_max=options.arena_bytes_max,
            run_path=os.fsencode(options.directory),
            framework=options.framework.encode(),
            python_version=options.python_version.encode(),
            lane=options.lane.encode(),
            gpu_ring_bytes=options.gpu_ring_bytes,
        )
        handle = ctypes.c_void_p()
        error = library.Error()
        code = self._library.sf_attach(byref(given), byref(handle), byref(error))
        _check(code, error)
        self._handle = handle.value

    @property
    def pid(self) -> int:
        """The process that may use it."""
        return self._pid

    @property
    def is_open(self) -> bool:
        """Whether close() has not begun."""
        return self._handle is not None

    def warnings(self) -> list[str]:
        """What the daemon found worth saying at the attach."""
        with self._using() as handle:
            text = self._library.sf_session_warnings(handle)
            return [line for line in (text or b"").decode().split("\n") if line]

    def describe(self) -> dict[str, Any]:
        """Lane, copy kernel, slots, socket, saves by result."""
        with self.lock, self._using() as handle:
            text = ctypes.c_void_p()
            error = library.Error()
            _check(self._library.sf_session_describe(handle, byref(text), byref(error)), error)
            described = json.loads(_take_text(text))
            assert isinstance(described, dict)
            return described

    def register_layout(self, parts: Sequence[PartSpec]) -> None:
        """Say what a save will hold; the same layout again costs nothing."""
        layout = CLayout(parts)
        with self.lock, self._using() as handle:
            error = library.Error()
            code = self._library.sf_layout_register(
                handle, layout.parts, layout.count, _LAYOUT_TIMEOUT_MS, byref(error)
            )
            _check(code, error)

    def begin_save(
        self, request: SaveRequest, sources: ctypes.Array[library.Source]
    ) -> tuple[int, float]:
        """Begin a save; return its ticket's number and the seconds that busy attempts took before.

        Raises:
            ResourceExhausted: no slot became free in `busy_timeout_ms`.
            StillframeError: as sf_save_begin(); nothing is held then.
        """
        names = [name.encode() for name, _ in request.metrics]
        options = library.SaveOptions(
            struct_bytes=ctypes.sizeof(library.SaveOptions),
            capture=library.CAPTURE_LAZY if request.is_lazy else library.CAPTURE_EAGER,
            check=library.CHECK_FULL if request.checks_all else library.CHECK_SAMPLE,
            has_pickle=request.has_pickle,
            metric_count=len(names),
            step=request.step,
            state_json=request.state_json,
            state_bytes=len(request.state_json),
        )
        if names:
            options.metric_names = (ctypes.c_char_p * len(names))(*names)
            options.metric_values = (ctypes.c_double * len(names))(
                *(value for _, value in request.metrics)
            )
        if request.streams:
            options.streams = (library.Stream * len(request.streams))(
                *(library.Stream(stream, device) for device, stream in request.streams)
            )
            options.stream_count = len(request.streams)
        ticket = ctypes.c_uint64()
        error = library.Error()
        first = time.monotonic()
        deadline = first + request.busy_timeout_ms / 1000
        with self.lock, self._using() as handle:
            while True:
                begin = time.monotonic()
                rest_ms = max(0, round((deadline - begin) * 1000))
                options.busy_timeout_ms = min(rest_ms, SLICE_MS)
                code = self._library.sf_save_begin(
                    handle, byref(options), sources, len(sources), byref(ticket), byref(error)
                )
                waited_ms = (time.monotonic() - begin) * 1000
                # An answer before the slice ended is about something else than busy slots.
                is_busy = code == library.RESOURCE_EXHAUSTED and waited_ms >= 0.9 * SLICE_MS
                if not is_busy or time.monotonic() >= deadline:
                    break
        _check(code, error)
        return ticket.value, begin - first

    def capture_wait(self, ticket: int, *, stall_ms: int, help: bool) -> bool:
        """Wait until every byte is copied; False when nothing moved for `stall_ms`. Any thread."""
        with self._using() as handle:
            error = library.Error()
            code = self._library.sf_capture_wait(handle, ticket, stall_ms, help, byref(error))
            return _reached(code, error)

    def open_fence(self, ticket: int, *, stall_ms: int) -> bool:
        """Let GPUs' streams wait for the capture, and copy what is the host's; see the C header.

        Returns:
            False when nothing moved for `stall_ms`.

        Raises:
            DataLoss: a tensor of the host changed meanwhile; the save has failed.
        """
        with self.lock, self._using() as handle:
            error = library.Error()
            code = self._library.sf_capture_fence(handle, ticket, stall_ms, byref(error))
            return _reached(code, error)

    def publish(self, ticket: int) -> None:
        """Compare blocks and make the snapshot CAPTURED.

        Raises:
            DataLoss: a tensor changed meanwhile; the save has failed.
        """
        with self.lock, self._using() as handle:
            error = library.Error()
            _check(self._library.sf_capture_publish(handle, ticket, byref(error)), error)

    def void(self, ticket: int, reason: str, *, torn: bool = False) -> None:
        """Give a capture up: afterwards nothing reads the sources any more."""
        with self.lock, self._using() as handle:
            error = library.Error()
            code = self._library.sf_capture_void(
                handle, ticket, torn, reason.encode(), byref(error)
            )
            _check(code, error)

    def ticket_info(self, ticket: int) -> library.TicketInfo:
        """What is known of a save now; does not wait. Any thread."""
        with self._using() as handle:
            info = library.TicketInfo(struct_bytes=ctypes.sizeof(library.TicketInfo))
            error = library.Error()
            _check(self._library.sf_ticket_get(handle, ticket, byref(info), byref(error)), error)
            return info

    def ticket_wait(self, ticket: int, state: int, deadline: float | None) -> bool:
        """Wait for a state; False when time.monotonic() reached `deadline`. Any thread.

        Raises:
            StillframeError: the save failed with this.
        """
        while True:
            rest_ms = _slice_ms(deadline)
            with self._using() as handle:
                error = library.Error()
                code = self._library.sf_ticket_wait(handle, ticket, state, rest_ms, byref(error))
            if _reached(code, error):
                return True
            if _has_passed(deadline):
                return False

    def settle(self, deadline: float) -> bool:
        """Wait until no save of the run is CAPTURED but not yet DURABLE; False at `deadline`."""
        while True:
            with self.lock, self._using() as handle:
                error = library.Error()
                code = self._library.sf_session_settle(handle, _slice_ms(deadline), byref(error))
            if _reached(code, error):
                return True
            if _has_passed(deadline):
                return False

    def remove_checkpoint(self, sequence: int, timeout: float) -> bool:
        """Have the daemon remove a checkpoint of the run, which must have a newer one.

        Returns:
            False when `timeout` seconds have passed: the daemon may go on removing it.

        Raises:
            InvalidArgument: a tag protects it, or no newer one restores.
            NotFound: it is not there.
            ResourceExhausted: for all of that time the daemon had three earlier ones to remove.
        """
        with self.lock, self._using() as handle:
            error = library.Error()
            code = self._library.sf_checkpoint_remove(
                handle, sequence, round(timeout * 1000), byref(error)
            )
            return _reached(code, error)

    @contextmanager
    def lend_handle(self) -> Iterator[int]:
        """The sf_session for a call made elsewhere, which then owns the session's thread."""
        with self.lock, self._using() as handle:
            yield handle

    def close(self, timeout: float) -> None:
        """End the capture in progress within `timeout` seconds, detach, free. Twice is harmless."""
        if os.getpid() != self._pid:
            self._handle = None
            return
        with self.lock:
            with self._users_changed:
                handle, self._handle = self._handle, None
                if handle is None:
                    return
                # Waiting calls of other threads come back within a slice. One that does not keeps
                # its memory: a leak is better than a crash of the training.
                is_idle = self._users_changed.wait_for(
                    lambda: self._users == 0, timeout + _LAST_CALLS_TIMEOUT
                )
            if is_idle:
                error = library.Error()
                timeout_ms = max(0, round(timeout * 1000))
                code = self._library.sf_session_close(handle, timeout_ms, byref(error))
                _check(code, error)

    @contextmanager
    def _using(self) -> Iterator[int]:
        if os.getpid() != self._pid:
            raise InvalidArgument(
                "this process is a fork of the one that made the Checkpointer; make a new one here"
            )
        with self._users_changed:
            if self._handle is None:
                raise Cancelled("the Checkpointer was closed")
            handle = self._handle
            self._users += 1
        try:
            yield handle
        finally:
            with self._users_changed:
                self._users -= 1
                self._users_changed.notify_all()


def list_run(directory: str) -> list[dict[str, Any]]:
    """The run's checkpoints, oldest first; none for a run that does not exist."""
    loaded = library.loaded()
    text = ctypes.c_void_p()
    error = library.Error()
    _check(loaded.sf_run_list(os.fsencode(directory), byref(text), byref(error)), error)
    entries = json.loads(_take_text(text))
    assert isinstance(entries, list)
    return entries


def _take_text(text: ctypes.c_void_p) -> bytes:
    try:
        return ctypes.string_at(text.value or 0)
    finally:
        library.loaded().sf_free(text)


def _check(code: int, error: library.Error) -> None:
    if code != library.OK:
        raise error_from_code(
            code, error.message.decode(errors="replace") or "no message", error.native
        )


def _reached(code: int, error: library.Error) -> bool:
    if code == library.TIMEOUT:
        return False
    _check(code, error)
    return True


def _slice_ms(deadline: float | None) -> int:
    if deadline is None:
        return SLICE_MS
    return max(0, min(SLICE_MS, round((deadline - time.monotonic()) * 1000)))


def _has_passed(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline
