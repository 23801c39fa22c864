"""How often to save so that saving costs a given share of the time: `overhead_target`.

What a save costs is measured, not assumed: how much longer than usual the steps took while it was
under way, and the call itself.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

from stillframe._core.telling import told_seconds
from stillframe._core.warn import log

# Steps without a save that tell how long a step takes; before so many nothing is saved.
_BASELINE_STEPS_MIN = 10
_BASELINE_STEPS_MAX = 101
_COSTS_KEPT = 5
# A choice is told again when it has moved by more than this.
_TOLD_RATIO = 1.5


class OverheadTarget:
    """Chooses the number of steps between saves.

    Args:
        share: of the time, such as 0.01.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.interval_steps: int | None = None
        self._told_steps: int | None = None
        self._quiet: deque[float] = deque(maxlen=_BASELINE_STEPS_MAX)
        self._loaded: list[float] = []
        self._call_seconds = 0.0
        self._costs: deque[float] = deque(maxlen=_COSTS_KEPT)
        self._steps_since_save = 0

    def stepped(self, seconds: float, *, is_saving: bool) -> None:
        """A training step took so long; a save was under way or not."""
        self._steps_since_save += 1
        (self._loaded if is_saving else self._quiet).append(seconds)

    def is_due(self) -> bool:
        """Whether this step is to be saved."""
        if len(self._quiet) < _BASELINE_STEPS_MIN:
            return False
        return self._steps_since_save >= (self.interval_steps or _BASELINE_STEPS_MIN)

    def saved(self, call_seconds: float) -> None:
        """A save has begun, and its call took so long, waiting for the first arena left out."""
        self._steps_since_save = 0
        self._call_seconds = call_seconds
        self._loaded.clear()

    def ended(self, known_seconds: float) -> None:
        """The save is over; `known_seconds` are those that training is known to have waited."""
        if not self._quiet:
            return
        usual = statistics.median(self._quiet)
        lost = self._call_seconds + sum(self._loaded) - usual * len(self._loaded)
        self._costs.append(max(lost, known_seconds, 0.0))
        cost = statistics.median(self._costs)
        # At least until the save before is over, or the next one would be skipped.
        steps = max(len(self._loaded) + 1, math.ceil(cost / (self.share * max(usual, 1e-9))))
        self.interval_steps = steps
        told = self._told_steps
        if told is None or not told / _TOLD_RATIO <= steps <= told * _TOLD_RATIO:
            self._told_steps = steps
            log.info("%s", self.describe())

    def describe(self) -> str:
        """What was chosen, and from what."""
        if self.interval_steps is None:
            return f"overhead_target={self.share:g}: still measuring"
        usual = statistics.median(self._quiet)
        return (
            f"overhead_target={self.share:g}: a save costs "
            f"{told_seconds(statistics.median(self._costs))} of training, a step takes "
            f"{told_seconds(usual)}: saving every {self.interval_steps} steps "
            f"({told_seconds(usual * self.interval_steps)})"
        )
