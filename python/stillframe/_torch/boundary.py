"""Where a training stands between two optimizer steps, as step() and the optimizers' hooks tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillframe._core.ticket import Ticket


class Boundary:
    """The last step(), and whether the state still is the one that it spoke of.

    Attributes:
        step: of the last step(); None before the first.
        metrics: as given to it.
        extra: likewise.
        epoch: likewise.
        is_saved: whether a save of it has begun.
        was_skipped: whether the newest save that was due was skipped.
    """

    def __init__(self) -> None:
        self.was_skipped = False
        self._hooks_run = False
        self.forget()

    def forget(self) -> None:
        """Another state was restored."""
        self.step: int | None = None
        self.metrics: Mapping[str, Any] | None = None
        self.extra: Any = None
        self.epoch: int | None = None
        self.is_saved = False
        self._has_stepped = False

    def reached(
        self, step: int, metrics: Mapping[str, Any] | None, extra: Any, epoch: int | None
    ) -> None:
        """step() was called."""
        self.step = step
        self.metrics = metrics
        self.extra = extra
        self.epoch = epoch
        self.is_saved = self._has_stepped = False

    def left(self) -> None:
        """An optimizer begins a step."""
        self._has_stepped = self._hooks_run = True

    def saved(self, ticket: Ticket) -> None:
        """A save of the state of now has begun, or was skipped, or has failed at once."""
        self.is_saved = ticket.has_begun
        self.was_skipped = not ticket.has_begun and ticket.state == "skipped"

    def why_lost(self) -> str | None:
        """Why the state of the last step() cannot be saved any more; None if it can."""
        if self._has_stepped:
            return f"an optimizer had begun the step behind {self.step}, so that state is gone"
        if not self._hooks_run:
            return f"whether an optimizer has stepped since step {self.step} is not known"
        return None

    def make_extra(self) -> Any:
        """`extra`, or what it makes."""
        return self.extra() if callable(self.extra) else self.extra
