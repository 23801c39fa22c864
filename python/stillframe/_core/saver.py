"""Saver: the writer of one run, whatever the framework.

It attaches to the daemon, registers layouts, begins saves, ends their captures, and tells of those
that fail. What is in a save (tensors, their memory, the text beside them) is its caller's business
and comes as a Content; when training writes that memory again is too, and comes as a Lazy.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

from stillframe._core import library
from stillframe._core.fence import STALL_MS, Capture, Fence
from stillframe._core.layout import PartSpec
from stillframe._core.report import Journal, Report
from stillframe._core.session import AttachOptions, SaveRequest, Session
from stillframe._core.ticket import Ticket
from stillframe._core.warn import log, warn
from stillframe.errors import Cancelled, InvalidArgument, ResourceExhausted, StillframeError

# How long leaving without close() may take.
EXIT_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class SaverOptions:
    """What holds for all saves; see stillframe.torch.Checkpointer."""

    when_busy: Literal["wait", "skip"] = "wait"
    busy_timeout: float = 60.0
    checks_all: bool = False
    on_error: Literal["warn", "raise"] = "warn"


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """What one save holds.

    Attributes:
        parts: the layout; the same list object again costs nothing.
        sources: where the tensors' bytes are, in the order of the layout. Whoever made it keeps the
            memory alive: of eager sources until begin() returns, of lazy ones by Lazy.aliases.
        state_json: state.json, UTF-8.
        has_pickle: whether state_json has pickles in it.
        streams: of each GPU that has a source, its number and the CUstream that training uses.
    """

    parts: list[PartSpec]
    sources: ctypes.Array[library.Source]
    state_json: bytes
    has_pickle: bool = False
    streams: Sequence[tuple[int, int]] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Lazy:
    """A save whose lazy sources are copied after begin() has returned.

    Attributes:
        aliases: keep the memory of the lazy sources alive until CAPTURED.
        find_changed: names a tensor that was provably written since, or answers None.
    """

    aliases: Sequence[Any]
    find_changed: Callable[[], str | None]


class Saver:
    """Saves of one run. Attaches at the first use; belongs to the process that made it.

    Who saves or restores holds the lock of attach()'s session from make_ready() on, so that two
    threads cannot mix their saves.
    """

    def __init__(self, options: AttachOptions, how: SaverOptions) -> None:
        self.options = options
        self._how = how
        self._pid = os.getpid()
        self._session: Session | None = None
        self._fence: Fence | None = None
        self._closer: weakref.finalize[[Session, Fence], Saver] | None = None
        self._is_closed = False
        self._registered: list[PartSpec] | None = None
        self._last: Ticket | None = None
        self._outstanding: list[Ticket] = []
        self._unraised: StillframeError | None = None
        self._counts = {"skipped": 0, "failed": 0}
        self._journal = Journal()

    @property
    def busy_timeout(self) -> float:
        """Seconds that a save waits for a slot."""
        return self._how.busy_timeout

    @property
    def has_outstanding(self) -> bool:
        """Whether a save has not been seen to end."""
        return bool(self._outstanding)

    @property
    def is_usable(self) -> bool:
        """Whether it is open, and this is the process that made it."""
        return not self._is_closed and os.getpid() == self._pid

    def check_usable(self) -> None:
        """Raise unless it can be used.

        Raises:
            InvalidArgument: this process is a fork of the one that made it.
            Cancelled: it was closed.
        """
        self._check_process()
        if self._is_closed:
            raise Cancelled("the Checkpointer was closed")

    def attach(self) -> Session:
        """The session, attached now if it was not; see Session for what can go wrong."""
        if self._session is None:
            session = Session(self.options)
            self._session, self._fence = session, Fence(session)
            self._journal.lane = str(session.describe().get("lane", "unknown"))
            # Runs at close(), when nobody uses this any more, or when the interpreter ends.
            self._closer = weakref.finalize(self, _end, session, self._fence)
            for line in session.warnings():
                warn(line)
        return self._session

    # --- Saving -----------------------------------------------------------------------------------

    def make_ready(self) -> None:
        """Attach, end the capture in progress, warn of failures: what comes before each save.

        Raises:
            StillframeError: with on_error="raise": the failure of an earlier save.
        """
        self.check_usable()
        self.attach()
        self.finish_capture()
        self.note_ended()
        if self._unraised is not None and self._how.on_error == "raise":
            error, self._unraised = self._unraised, None
            raise error

    def begin(
        self,
        content: Content,
        *,
        step: int,
        metrics: Sequence[tuple[str, float]],
        capture: str,
        lazy: Lazy | None,
        when_busy: Literal["wait", "skip"] | None = None,
        busy_timeout: float | None = None,
    ) -> Ticket:
        """Begin a save, after make_ready(); returns when all but the lazy sources are copied.

        Args:
            content: what to save.
            step: checked by checked_step().
            metrics: checked by checked_metrics().
            capture: for people: which way it is taken, and why.
            lazy: None copies everything before this returns.
            when_busy: for this save; None is as for all.
            busy_timeout: likewise.

        Returns:
            The ticket: accepted, or failed or skipped, which was warned of.

        Raises:
            InvalidArgument: the layout or the state cannot be saved.
        """
        session = self.attach()
        assert self._fence is not None
        skips = (when_busy or self._how.when_busy) == "skip"
        timeout = self._how.busy_timeout if busy_timeout is None else busy_timeout
        request = SaveRequest(
            step=step,
            metrics=metrics,
            state_json=content.state_json,
            has_pickle=content.has_pickle,
            is_lazy=lazy is not None,
            checks_all=self._how.checks_all,
            busy_timeout_ms=STALL_MS if skips else round(1000 * timeout),
            streams=content.streams,
        )
        with session.lock:
            try:
                self._register(session, content.parts)
                number, busy_seconds = session.begin_save(request, content.sources)
            except InvalidArgument:
                raise
            except StillframeError as error:
                ticket = self._failed_ticket(step, capture, error, skips=skips)
                self._outstanding.append(ticket)
                if ticket.state != "skipped":
                    # close() waits for the one before a skipped one.
                    self._last = ticket
                return ticket
            ticket = Ticket(
                step=step,
                capture=capture,
                session=session,
                number=number,
                finish_capture=_finisher(self._fence),
            )
            ticket._busy_seconds_before = busy_seconds
            if lazy is not None:
                on_gpus = bool(content.streams)
                self._fence.begin(
                    Capture(number, lazy.aliases, lazy.find_changed, is_on_gpus=on_gpus)
                )
            if content.streams:
                self._journal.lane = str(session.describe()["lane"])
        self._outstanding.append(ticket)
        self._last = ticket
        return ticket

    def register_early(self, parts: list[PartSpec]) -> None:
        """Let the arena be made ready, or taken over from the trainer before, ahead of a save."""
        try:
            self._register(self.attach(), parts)
        except StillframeError as error:
            # Worth nothing now; a save says it again if it lasts.
            log.info("the layout was not registered: %s", error)

    def _register(self, session: Session, parts: list[PartSpec]) -> None:
        if self._registered is not parts and self._registered != parts:
            self._registered = None
            session.register_layout(parts)
            self._registered = parts

    def _failed_ticket(
        self, step: int, capture: str, error: StillframeError, *, skips: bool
    ) -> Ticket:
        is_skipped = skips and isinstance(error, ResourceExhausted)
        ticket = Ticket(step=step, capture=capture, error=error, is_skipped=is_skipped)
        if is_skipped:
            self._counts["skipped"] += 1
            if self._counts["skipped"] == 1:
                warn(f"the save of step {step} was skipped: {error}")
        else:
            self._report_failure(ticket)
        return ticket

    # --- Waiting ----------------------------------------------------------------------------------

    def finish_capture(self) -> None:
        """Help to copy what is being captured, then publish it; gives it up without progress.

        Never raises for what went wrong with the save: its ticket has that.
        """
        if self._fence is not None:
            self._fence.finish()

    def open_fence(self) -> None:
        """Let training write again, as finish_capture() but without waiting for a GPU."""
        if self._fence is not None:
            self._fence.open()

    def close(self, timeout: float | None = None) -> None:
        """Wait until the last save is durable, then let the daemon go. Twice is harmless.

        Args:
            timeout: seconds; None waits until the last save has ended one way or the other.

        Raises:
            TimeoutError: the last save is not durable in that time; the daemon goes on with it.
            StillframeError: the last save has failed.
        """
        self._check_process()
        if self._is_closed:
            return
        self._is_closed = True
        last, self._last = self._last, None
        try:
            if last is not None:
                last.wait("durable", timeout)
        finally:
            if self._session is not None:
                self.note_ended()
            if self._closer is not None:
                self._closer()

    # --- Telling ----------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Lane, copy kernel, slots, socket, saves by result, last error; does not attach."""
        self._check_process()
        known: dict[str, Any] = {
            "directory": self.options.directory,
            "attached": self._session is not None and self._session.is_open,
            "last_capture": self._last.capture if self._last is not None else None,
            "last_error": str(self._unraised) if self._unraised is not None else None,
            **self._counts,
        }
        if self._session is not None and self._session.is_open:
            known.update(self._session.describe())
        return known

    def note_ended(self) -> None:
        """Tell of saves that have ended since the last look: by a warning, or a line in the log."""
        still_open = []
        for ticket in self._outstanding:
            if not ticket.is_final:
                still_open.append(ticket)
                continue
            if ticket.state == "failed" and ticket.has_begun:
                self._report_failure(ticket)
            self._journal.add(ticket)
        self._outstanding = still_open

    def report(self, interval: str | None = None) -> Report:
        """What saving has cost and yielded so far; see Checkpointer.report()."""
        self._check_process()
        self.note_ended()
        return self._journal.report(self._outstanding, interval)

    def _report_failure(self, ticket: Ticket) -> None:
        self._counts["failed"] += 1
        error = ticket.error
        if error is not None:
            self._unraised = error
        warn(f"the save of step {ticket.step} has failed: {error}")

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise InvalidArgument(
                "this process is a fork of the one that made the Checkpointer; make a new one here"
            )


def _end(session: Session, fence: Fence) -> None:
    """Finish or void the capture, end our threads, detach. Never raises: nobody could catch it."""
    try:
        if os.getpid() == session.pid:
            fence.stop(stall_ms=STALL_MS)
        session.close(EXIT_SECONDS)
    except StillframeError as error:
        log.warning("closing the session: %s", error)


def _finisher(fence: Fence) -> Callable[[Ticket, float | None], None]:
    def finish(ticket: Ticket, timeout: float | None) -> None:
        seconds = 10.0 if timeout is None else min(timeout, 10.0)
        fence.help(ticket._number, round(seconds * 1000))

    return finish
