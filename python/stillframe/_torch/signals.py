"""The flag that SIGTERM and SIGUSR1 set, so that the next step() can save and end the training.

A job manager sends one of them some time before it kills. Handlers before ours are called too; ours
go when the Checkpointer is closed or no longer used.
"""

from __future__ import annotations

import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from stillframe._core.warn import log
from stillframe.errors import InvalidArgument

DEFAULT_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# 128 + SIGTERM: what a shell reports of a process that the signal has ended.
EXIT_CODE = 143


class StopFlag:
    """Set by a signal; read by step().

    Attributes:
        signal: the number of the first that came; 0 for none.
    """

    def __init__(self, signals: Iterable[int]) -> None:
        """Remember which; nothing is installed before install().

        Raises:
            InvalidArgument: one is no signal, or one that cannot be handled.
        """
        self.signal = 0
        self._is_chained = False
        self._wanted = tuple(_checked(one) for one in signals)
        self._handlers: dict[int, _Handler] = {}
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._is_tried = False

    def install(self) -> None:
        """Put our handlers in front of those that are there; only the main thread can."""
        if self._is_tried or not self._wanted:
            return
        self._is_tried = True
        if threading.current_thread() is not threading.main_thread():
            log.info("step() runs beside the main thread: signals are left alone")
            return
        for number in self._wanted:
            handler = _Handler(number, weakref.WeakMethod(self._set))
            handler.install()
            self._handlers[number] = handler
        self._finalizer = weakref.finalize(self, _remove_all, self._handlers, os.getpid())

    def remove(self) -> None:
        """Put back the handlers that were there before."""
        if self._finalizer is not None:
            self._finalizer()

    def deliver(self) -> None:
        """After remove(): let a signal that no step() has answered do what it would have done."""
        number, self.signal = self.signal, 0
        if number and not self._is_chained:
            signal.raise_signal(number)

    def _set(self, number: int, is_chained: bool) -> None:
        if not self.signal:
            self.signal = number
            self._is_chained = is_chained


class _Handler:
    """One signal's handler, which knows the one before it."""

    def __init__(self, number: int, target: Callable[[], Callable[[int, bool], None] | None]):
        self._number = number
        self._target = target
        self._before: Any = None
        self._pid = os.getpid()

    def install(self) -> None:
        self._before = signal.signal(self._number, self)

    def remove(self) -> None:
        # Somebody else's handler in front of ours stays; ours then only passes on.
        current: Any = signal.getsignal(self._number)
        if current is self:
            before = self._before
            # Of another Checkpointer that was closed while ours stood in front.
            while isinstance(before, _Handler) and before._target is _nobody:
                before = before._before
            signal.signal(self._number, signal.SIG_DFL if before is None else before)
        self._target = _nobody

    def __call__(self, number: int, frame: FrameType | None) -> None:
        is_chained = callable(self._before)
        # A forked child (a worker of a pool) must end by SIGTERM as if nothing were here.
        target = self._target() if os.getpid() == self._pid else None
        if target is not None:
            target(number, is_chained)
        if is_chained:
            self._before(number, frame)
        elif target is None and self._before == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def _nobody() -> None:
    return None


def _remove_all(handlers: dict[int, _Handler], pid: int) -> None:
    if os.getpid() != pid or threading.current_thread() is not threading.main_thread():
        # Only the main thread may set handlers: ours stay, and only pass on.
        for handler in handlers.values():
            handler._target = _nobody
        return
    for handler in handlers.values():
        handler.remove()


def _checked(number: int) -> int:
    try:
        known = signal.Signals(number)
    except ValueError:
        raise InvalidArgument(f"signals has {number!r}, which is no signal") from None
    if known in (signal.SIGKILL, signal.SIGSTOP):
        raise InvalidArgument(f"signals has {known.name}, which cannot be handled")
    return int(known)
