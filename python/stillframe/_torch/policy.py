"""When step() saves: every so many steps, seconds or epochs, or as overhead_target chooses."""

from __future__ import annotations

import math
import time

from stillframe._core.arguments import checked_step
from stillframe._core.ticket import Ticket
from stillframe._torch.overhead import OverheadTarget
from stillframe.errors import InvalidArgument


class Policy:
    """Decides for one training; does not save.

    Args:
        every_steps: due when the step reaches or passes a multiple of it.
        every_seconds: due when so many seconds have passed since the save before, or the start.
        every_epochs: due when the completed epochs reach or pass a multiple of it.
        overhead_target: the share of time that saves may cost, which decides instead of the first
            two.

    Raises:
        InvalidArgument: a number is out of range, or two of them contradict.
    """

    def __init__(
        self,
        *,
        every_steps: int | None = None,
        every_seconds: float | None = None,
        every_epochs: int | None = None,
        overhead_target: float | None = None,
    ) -> None:
        for name, count in (("every_steps", every_steps), ("every_epochs", every_epochs)):
            if count is not None and (type(count) is not int or count < 1):
                raise InvalidArgument(f"{name} is {count!r}; it must be an integer of 1 or more")
        if every_seconds is not None and not 0 < every_seconds < math.inf:
            raise InvalidArgument(f"every_seconds is {every_seconds!r}; it must be above 0")
        if overhead_target is not None and not 0 < overhead_target < 1:
            raise InvalidArgument(
                f"overhead_target is {overhead_target!r}; it is a share, such as 0.01"
            )
        if overhead_target is not None and (every_steps or every_seconds):
            raise InvalidArgument(
                "overhead_target chooses the interval: leave every_steps and every_seconds out"
            )
        self.decides = any((every_steps, every_seconds, every_epochs, overhead_target))
        self.overhead = OverheadTarget(overhead_target) if overhead_target else None
        self.every_epochs = every_epochs
        self._every_steps = every_steps
        self._every_seconds = every_seconds
        self._last_step: int | None = None
        self._last_epoch: int | None = 0
        self._last_time = time.monotonic()
        self._step_end: float | None = None
        self._pending: Ticket | None = None

    def resumed(self, step: int, epoch: int | None) -> None:
        """Training goes on from a checkpoint of this step and these completed epochs."""
        self._last_step = step
        self._last_epoch = epoch
        self._last_time = time.monotonic()
        self._step_end = None

    def is_due(self, step: int, epoch: int | None) -> bool:
        """Called once for each step; whether it is to be saved.

        Raises:
            InvalidArgument: the step is no integer of 0 or more; or every_epochs was given, and
                nothing says which epoch this is.
        """
        if type(step) is not int or step < 0:
            step = checked_step(step)
        before, self._last_step = self._last_step, step
        due = False
        every = self._every_steps
        # The same step again, such as with the metrics of an evaluation, is not due again.
        if every is not None and before != step:
            # The first of all, and one after a rollback, is due only if it is a multiple itself.
            if before is None or before > step:
                before = step - 1
            due = step // every > before // every
        if self._every_seconds is not None and not due:
            due = time.monotonic() - self._last_time >= self._every_seconds
        if self.every_epochs is not None:
            due |= self._is_epoch_due(epoch)
        if self.overhead is not None and self._is_overhead_due(self.overhead):
            due = True
        return due and step > 0

    def saved(self, ticket: Ticket, now: float) -> None:
        """A save has begun at `now`, of time.monotonic()."""
        self._last_time = now
        if self.overhead is not None:
            times = ticket.times
            self.overhead.saved((times["call"] or 0.0) - (times.get("first_save_wait") or 0.0))
            self._pending = ticket

    def step_ended(self) -> None:
        """step() returns to the training."""
        if self.overhead is not None:
            self._step_end = time.perf_counter()

    def _is_epoch_due(self, epoch: int | None) -> bool:
        if type(epoch) is not int or epoch < 0:
            raise InvalidArgument(
                f"epoch is {epoch!r}: every_epochs= needs the completed epochs, as "
                "step(..., epoch=) or as loader.epoch of loader="
            )
        every = self.every_epochs
        assert every is not None
        before, self._last_epoch = self._last_epoch, epoch
        # What was resumed did not say: counting begins here.
        return before is not None and epoch // every > before // every

    def _is_overhead_due(self, overhead: OverheadTarget) -> bool:
        pending = self._pending
        if self._step_end is not None:
            seconds = time.perf_counter() - self._step_end
            overhead.stepped(seconds, is_saving=pending is not None)
        if pending is not None and pending.is_final:
            self._pending = None
            times = pending.times
            overhead.ended(
                (times["call"] or 0.0)
                - (times.get("first_save_wait") or 0.0)
                + (times.get("fence_wait") or 0.0)
            )
        return self._pending is None and overhead.is_due()
