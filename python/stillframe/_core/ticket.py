"""Tickets: what a save returns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from stillframe._core import library
from stillframe._core.session import Session
from stillframe.errors import Cancelled, ResourceExhausted, StillframeError, error_from_code

State = Literal["accepted", "captured", "durable", "skipped", "failed"]

_STATES: dict[int, State] = {
    library.STATE_ACCEPTED: "accepted",
    library.STATE_CAPTURED: "captured",
    library.STATE_DURABLE: "durable",
    library.STATE_FAILED: "failed",
}


class Ticket:
    """One save: how far it is, how long it took, why it failed.

    Only a "durable" save is called saved: it survives a loss of power. A "captured" one is in the
    daemon's memory: it survives the trainer.

    Attributes:
        step: as given to save().
        capture: which way it was taken and why, such as "lazy: the optimizers' step() waits for
            it".
    """

    def __init__(
        self,
        *,
        step: int,
        capture: str,
        session: Session | None = None,
        number: int = 0,
        error: StillframeError | None = None,
        is_skipped: bool = False,
        finish_capture: Callable[[Ticket, float | None], None] | None = None,
    ) -> None:
        self.step = step
        self.capture = capture
        self._session = session
        self._number = number
        self._info: library.TicketInfo | None = None
        self._error = error
        self._is_skipped = is_skipped
        self._finish_capture = finish_capture
        self._call_seconds = 0.0
        self._busy_seconds_before = 0.0
        self._began = time.monotonic()

    def __repr__(self) -> str:
        return f"<Ticket of step {self.step}: {self.state}, {self.capture}>"

    @property
    def state(self) -> State:
        """One of "accepted", "captured", "durable", "skipped", "failed"; does not wait."""
        if self._session is None:
            return "skipped" if self._is_skipped else "failed"
        return _STATES.get(self._refresh().state, "failed")

    @property
    def error(self) -> StillframeError | None:
        """Why the save was skipped or has failed; None otherwise."""
        if self._session is None:
            return self._error
        info = self._refresh()
        if info.state != library.STATE_FAILED:
            return None
        failure = info.failure
        return error_from_code(
            failure.code, failure.message.decode(errors="replace"), failure.native
        )

    @property
    def sequence(self) -> int | None:
        """The checkpoint's sequence in its run; None if the save never began."""
        return None if self._session is None else int(self._refresh().sequence)

    @property
    def bytes(self) -> int:
        """Size of all parts."""
        return 0 if self._session is None else int(self._refresh().bytes)

    @property
    def times(self) -> dict[str, float | None]:
        """Seconds, None for what has not happened yet.

        call: save() itself, of it busy_wait for a free slot and first_save_wait for the arena;
        fence_wait: that training later waited for the capture, its CPU and, known once it is
            captured, the stream of a GPU; to_captured, to_durable: from the call on.
        """
        if self._session is None:
            return {"call": self._call_seconds}
        info = self._refresh()

        def since_begin(then_ns: int) -> float | None:
            return (then_ns - info.begin_ns) / 1e9 if then_ns else None

        return {
            "call": self._call_seconds,
            "busy_wait": info.busy_wait_ns / 1e9 + self._busy_seconds_before,
            "first_save_wait": info.first_save_wait_ns / 1e9,
            "fence_wait": info.fence_wait_ns / 1e9,
            "to_captured": since_begin(info.captured_ns),
            "to_durable": since_begin(info.durable_ns),
        }

    @property
    def has_begun(self) -> bool:
        """Whether the daemon ever knew of it."""
        return self._session is not None

    @property
    def is_final(self) -> bool:
        """Whether nothing can change any more."""
        return self.state in ("durable", "skipped", "failed")

    def wait(
        self, state: Literal["captured", "durable"] = "durable", timeout: float | None = None
    ) -> None:
        """Wait until the save has reached `state`.

        Args:
            state: "captured" or "durable".
            timeout: seconds; None waits until the save ends one way or the other.

        Raises:
            TimeoutError: it has not in that time.
            StillframeError: it was skipped or has failed: this is why.
        """
        if state not in ("captured", "durable"):
            raise ValueError(f'state is {state!r}, not "captured" or "durable"')
        if self._session is None:
            raise self._error or ResourceExhausted("skipped")
        if not self._has_reached(state):
            deadline = None if timeout is None else time.monotonic() + timeout
            if self._finish_capture is not None:
                self._finish_capture(self, timeout)
            wanted = library.STATE_DURABLE if state == "durable" else library.STATE_CAPTURED
            if not self._session.ticket_wait(self._number, wanted, deadline):
                raise TimeoutError(f"step {self.step} is not {state} after {timeout} s")
            self._refresh()

    def _has_reached(self, state: str) -> bool:
        """Raises the failure of a failed save."""
        error = self.error
        if error is not None:
            raise error
        return self.state == "durable" or self.state == state

    def _refresh(self) -> library.TicketInfo:
        """The newest that can be known: after close(), what was known then."""
        known = self._info
        if known is not None and known.state in (library.STATE_DURABLE, library.STATE_FAILED):
            return known
        assert self._session is not None
        try:
            self._info = self._session.ticket_info(self._number)
        except Cancelled:
            if known is None:
                raise
        assert self._info is not None
        return self._info
