"""What saving has cost and yielded: lines in the log, a table, a dict, scalars for a tracker."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from stillframe._core.telling import told_bytes, told_seconds
from stillframe._core.ticket import State, Ticket
from stillframe._core.warn import log

_RECORDS_MAX = 1_000


class ScalarWriter(Protocol):
    """torch.utils.tensorboard.SummaryWriter, or what else has its add_scalar()."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> Any:
        """Take one number."""


@dataclasses.dataclass(frozen=True, slots=True)
class SaveRecord:
    """One save that has ended; times in seconds, None for what did not happen.

    Attributes:
        waited: what training lost: the call of save(), and the optimizer's wait at the fence.
        fence_wait: the latter: the CPU's, and with tensors on GPUs that of their stream.
        captured: from the call until all bytes were in the daemon's memory.
        durable: from the call until they would survive a loss of power.
    """

    step: int
    state: State
    waited: float
    call: float
    fence_wait: float
    captured: float | None
    durable: float | None
    bytes: int
    began: float
    error: str | None

    @property
    def durable_lag(self) -> float | None:
        """From captured to durable."""
        if self.durable is None or self.captured is None:
            return None
        return self.durable - self.captured


class Journal:
    """Collects the saves of one Checkpointer. One thread at a time."""

    def __init__(self) -> None:
        self._records: deque[SaveRecord] = deque(maxlen=_RECORDS_MAX)
        self._counts: dict[str, int] = {"durable": 0, "skipped": 0, "failed": 0}
        self._lost_seconds = 0.0
        self._bytes = 0
        self.lane = "unknown"

    def add(self, ticket: Ticket) -> None:
        """A save has ended; says so in the log if it is durable."""
        times = ticket.times
        call, fence_wait = times["call"] or 0.0, times.get("fence_wait") or 0.0
        error = ticket.error
        record = SaveRecord(
            step=ticket.step,
            state=ticket.state,
            waited=call + fence_wait,
            call=call,
            fence_wait=fence_wait,
            captured=times.get("to_captured"),
            durable=times.get("to_durable"),
            bytes=ticket.bytes,
            began=ticket._began,
            error=str(error) if error is not None else None,
        )
        self._records.append(record)
        self._counts[record.state] += 1
        self._lost_seconds += record.waited
        if record.state != "durable":
            return
        self._bytes += record.bytes
        log.info(
            "step=%d waited=%s captured=%s durable=%s bytes=%s lane=%s",
            record.step,
            told_seconds(record.waited),
            told_seconds(record.captured),
            told_seconds(record.durable),
            told_bytes(record.bytes),
            self.lane,
        )

    def report(self, under_way: Sequence[Ticket], interval: str | None) -> Report:
        """All that is known now."""
        return Report(
            records=tuple(self._records),
            durable=self._counts["durable"],
            skipped=self._counts["skipped"],
            failed=self._counts["failed"],
            lost_seconds=self._lost_seconds,
            saved_bytes=self._bytes,
            backlog_saves=len(under_way),
            backlog_bytes=sum(ticket.bytes for ticket in under_way),
            interval=interval,
            lane=self.lane,
        )


@dataclasses.dataclass(frozen=True)
class Report:
    """What the saves of a Checkpointer have cost and yielded so far. Prints as a table.

    Attributes:
        records: the saves that have ended, oldest first; the newest 1000.
        durable: how many became durable.
        skipped: how many were not made, because no slot was free.
        failed: how many failed.
        lost_seconds: that training waited for all of them: calls and fence.
        saved_bytes: size of all that became durable.
        backlog_saves: saves under way.
        backlog_bytes: their size.
        interval: what overhead_target has chosen, in words; None without one.
        lane: the way that bytes go.
    """

    records: tuple[SaveRecord, ...]
    durable: int
    skipped: int
    failed: int
    lost_seconds: float
    saved_bytes: int
    backlog_saves: int
    backlog_bytes: int
    interval: str | None
    lane: str

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain values: seconds, bytes, counts; records as dicts.

        The members `waited`, `fence_wait`, `captured`, `durable_lag`, `bytes` and `interval` each
        have `median` and `max`, or are None without a save that ended.
        """
        saved = [record for record in self.records if record.state == "durable"]
        begins = [record.began for record in self.records]
        return {
            "durable": self.durable,
            "skipped": self.skipped,
            "failed": self.failed,
            "lost_seconds": self.lost_seconds,
            "saved_bytes": self.saved_bytes,
            "backlog_saves": self.backlog_saves,
            "backlog_bytes": self.backlog_bytes,
            "lane": self.lane,
            "overhead": self.interval,
            "waited": _spread([record.waited for record in self.records]),
            "fence_wait": _spread([record.fence_wait for record in self.records]),
            "captured": _spread([record.captured for record in saved]),
            "durable_lag": _spread([record.durable_lag for record in saved]),
            "bytes": _spread([record.bytes for record in saved]),
            "interval": _spread([later - before for before, later in itertools.pairwise(begins)]),
            "records": [dataclasses.asdict(record) for record in self.records],
        }

    def scalars(self) -> dict[str, float]:
        """What a tracker plots, of the save that became durable last.

        stillframe/stall_ms is what training waited, /capture_s and /durable_lag_s are seconds,
        /gbps is 10^9 bytes a second from captured to durable, /backlog_bytes is of now.
        """
        values = {"stillframe/backlog_bytes": float(self.backlog_bytes)}
        newest = self._newest()
        if newest is None:
            return values
        values["stillframe/stall_ms"] = 1e3 * newest.waited
        if newest.captured is not None:
            values["stillframe/capture_s"] = newest.captured
        lag = newest.durable_lag
        if lag is not None:
            values["stillframe/durable_lag_s"] = lag
            if lag > 0:
                values["stillframe/gbps"] = newest.bytes / lag / 1e9
        return values

    def to_tensorboard(self, writer: ScalarWriter, step: int | None = None) -> None:
        """Write scalars() to a SummaryWriter.

        Args:
            writer: anything with add_scalar(tag, value, step).
            step: on the x axis; None takes that of the save that became durable last.
        """
        newest = self._newest()
        if step is None and newest is not None:
            step = newest.step
        for tag, value in self.scalars().items():
            writer.add_scalar(tag, value, step)

    def __str__(self) -> str:
        known = self.as_dict()
        rows = [
            ("saves", f"{self.durable} durable, {self.skipped} skipped, {self.failed} failed"),
            ("under way", f"{self.backlog_saves}, {told_bytes(self.backlog_bytes)}"),
            ("lost step time", f"{told_seconds(self.lost_seconds)} in all"),
        ]
        for name, title, told in (
            ("waited", "  per save", told_seconds),
            ("fence_wait", "  of it at the fence", told_seconds),
            ("captured", "captured after", told_seconds),
            ("durable_lag", "then durable after", told_seconds),
            ("bytes", "size", told_bytes),
            ("interval", "interval", told_seconds),
        ):
            spread = known[name]
            if spread is not None:
                rows.append(
                    (title, f"{told(spread['median'])} median, {told(spread['max'])} at most")
                )
        rows.append(("lane", self.lane))
        if self.interval is not None:
            rows.append(("chosen", self.interval))
        failures = [record for record in self.records if record.error is not None]
        if failures:
            rows.append(("last error", f"step {failures[-1].step}: {failures[-1].error}"))
        width = max(len(title) for title, _ in rows)
        return "\n".join(f"{title:<{width}}  {text}" for title, text in rows)

    def _newest(self) -> SaveRecord | None:
        return next((one for one in reversed(self.records) if one.state == "durable"), None)


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"median": statistics.median(known), "max": max(known)}
