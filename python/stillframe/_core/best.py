"""The best checkpoints: what decides, which are they, and whether a new one is among them.

Metrics live in the manifests, so the best of a run outlive the process. NaN never is best; of equal
ones the newest is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from stillframe._core.arguments import check_metric_name, number_of
from stillframe._core.ticket import Ticket
from stillframe._core.warn import warn
from stillframe.errors import InvalidArgument

_COUNT_MAX = 10_000
_CRITERIA_MAX = 16  # SF_BEST_COUNT_MAX
# After so many saves without its metric a criterion is taken for a mistake.
_SAVES_BEFORE_WARNING = 20


# ("val_loss", "min", 3)
BestRule = tuple[str, str, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Criterion:
    """One of `best=`: keep the `count` checkpoints with the least or greatest `metric`."""

    metric: str
    mode: Literal["min", "max"]
    count: int

    def rank(self, value: float) -> float:
        """Smaller is better; NaN stays NaN."""
        return -value if self.mode == "max" else value


def parse_best(best: Any) -> tuple[Criterion, ...]:
    """Criteria from `("val_loss", "min", 3)` or a list of such.

    Raises:
        InvalidArgument: it has another form, or names a metric twice.
    """
    if best is None:
        return ()
    is_one = isinstance(best, tuple) and bool(best) and isinstance(best[0], str)
    if not is_one and not isinstance(best, list | tuple):
        raise InvalidArgument(f"best is {best!r}; {_FORM}")
    criteria = tuple(_criterion(one) for one in ([best] if is_one else best))
    if len(criteria) > _CRITERIA_MAX:
        raise InvalidArgument(f"best has {len(criteria)} criteria; {_CRITERIA_MAX} are the most")
    metrics = [one.metric for one in criteria]
    for metric in metrics:
        if metrics.count(metric) > 1:
            raise InvalidArgument(f"best= names the metric {metric} twice")
    return criteria


_FORM = 'it must be ("metric", "min" or "max", how many), or a list of such'


def _criterion(given: Any) -> Criterion:
    if not isinstance(given, list | tuple) or len(given) not in (2, 3):
        raise InvalidArgument(f"best has {given!r}; {_FORM}")
    metric, mode = given[:2]
    count = given[2] if len(given) == 3 else 1
    check_metric_name(metric)
    if mode not in ("min", "max"):
        raise InvalidArgument(f'best has the mode {mode!r}, not "min" or "max"; {_FORM}')
    if type(count) is not int or not 1 <= count <= _COUNT_MAX:
        raise InvalidArgument(f"best has the count {count!r}, not 1 to {_COUNT_MAX}; {_FORM}")
    return Criterion(metric, mode, count)


def criterion_named(criteria: Sequence[Criterion], metric: str | None) -> Criterion:
    """The criterion of this metric; None takes the first.

    Raises:
        InvalidArgument: there is none; the message says which there are.
    """
    if not criteria:
        raise InvalidArgument(
            'the run has no criterion of its own; pass best=("metric", "min" or "max", count)'
        )
    if metric is None:
        return criteria[0]
    for one in criteria:
        if one.metric == metric:
            return one
    known = ", ".join(one.metric for one in criteria)
    raise InvalidArgument(f"best= has no criterion {metric!r}; it has {known}")


def stored_criteria(entries: Sequence[Mapping[str, Any]]) -> list[Criterion]:
    """The criteria of a run's newest checkpoint, for those who were given none."""
    newest = next((one for one in reversed(entries) if one["damage"] is None), None)
    return (
        []
        if newest is None
        else [Criterion(one["metric"], one["mode"], 1) for one in newest["best"]]
    )


def best_first(
    criterion: Criterion, newest_first: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The entries of a run's list that have the metric, best first."""
    ranked = []
    for entry in newest_first:
        value = float(entry["metrics"].get(criterion.metric, "nan"))
        if not math.isnan(value):
            ranked.append((criterion.rank(value), entry))
    # Stable: of equals the newest comes first.
    return [entry for _, entry in sorted(ranked, key=lambda pair: pair[0])]


class BestTracker:
    """Says whether metrics would be among the best of the run.

    Args:
        criteria: of `best=`.
        list_entries: the run's checkpoints; called once, when first needed.
    """

    def __init__(
        self, criteria: Sequence[Criterion], list_entries: Callable[[], Sequence[Mapping[str, Any]]]
    ) -> None:
        self._criteria = criteria
        self._list_entries = list_entries
        # Ranks of the best, worst last, with the ticket of those that may still fail.
        self._best: dict[str, list[tuple[float, Ticket | None]]] | None = None
        self._save_count = 0
        self._is_reported = {one.metric: False for one in criteria}
        self._seen: set[str] = set()

    def enters(self, metrics: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with these metrics would be among the best by any criterion.

        Raises:
            InvalidArgument: one of them that matters is not a number.
        """
        result = False
        for one in self._criteria:
            if one.metric not in metrics:
                continue
            rank = one.rank(number_of(one.metric, metrics[one.metric]))
            if math.isnan(rank):
                continue
            known = self._known(one)
            result |= len(known) < one.count or rank <= known[one.count - 1][0]
        return result

    def look_before(self, metrics: Sequence[tuple[str, float]]) -> None:
        """Ahead of a save with these metrics: know the best without it."""
        for one in self._criteria:
            if any(name == one.metric for name, _ in metrics):
                self._known(one)

    def record(self, metrics: Mapping[str, float], ticket: Ticket) -> None:
        """A save with these metrics has begun."""
        self._save_count += 1
        self._seen.update(metrics)
        for one in self._criteria:
            if one.metric not in metrics:
                continue
            self._is_reported[one.metric] = True
            rank = one.rank(metrics[one.metric])
            if not math.isnan(rank) and ticket.state not in ("skipped", "failed"):
                known = self._known(one)
                known.append((rank, ticket))
                known.sort(key=lambda pair: pair[0])
                # More than count: should one of them fail, its successor is still known.
                del known[2 * one.count + 1 :]
        if self._save_count == _SAVES_BEFORE_WARNING:
            self.warn_of_unreported()

    def warn_of_unreported(self) -> None:
        """Warn, once each, of criteria whose metric no save has had."""
        if self._save_count == 0:
            return
        for one in self._criteria:
            self._known(one)
        for metric, is_reported in self._is_reported.items():
            if is_reported:
                continue
            self._is_reported[metric] = True
            seen = ", ".join(sorted(self._seen)) or "none"
            warn(
                f"best= asks for {metric}, which none of the {self._save_count} saves so far had "
                f"among its metrics (they had: {seen}); so none of them is kept as one of the best"
            )

    def _known(self, criterion: Criterion) -> list[tuple[float, Ticket | None]]:
        if self._best is None:
            newest_first = [e for e in reversed(self._list_entries()) if e["damage"] is None]
            self._best = {
                one.metric: [
                    (one.rank(float(entry["metrics"][one.metric])), None)
                    for entry in best_first(one, newest_first)[: 2 * one.count + 1]
                ]
                for one in self._criteria
            }
            for metric, found in self._best.items():
                self._is_reported[metric] |= bool(found)
        known = self._best[criterion.metric]
        known[:] = [
            (rank, None if ticket is None or ticket.state == "durable" else ticket)
            for rank, ticket in known
            if ticket is None or ticket.state not in ("skipped", "failed")
        ]
        return known
