"""Which value of a monitored metric is the better one, and which was the best so far."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from stillframe.errors import InvalidArgument, StillframeWarning

Direction = Literal["min", "max"]


def direction_of(monitor: str, mode: str, model: Any) -> Direction:
    """The direction in which `monitor` gets better.

    Args:
        monitor: a key of Keras's logs.
        mode: "min", "max", or "auto": losses go down, and Keras's metrics know.
        model: compiled; its metrics exist from the first batch on.

    Raises:
        InvalidArgument: mode is "auto", and nothing says.
    """
    if mode != "auto":
        return "min" if mode == "min" else "max"
    name = monitor.removeprefix("val_")
    if name == "loss":
        return "min"
    for metric in _metrics_of(model.metrics):
        if metric.name == name and hasattr(metric, "_direction"):
            return "max" if metric._direction == "up" else "min"
    raise InvalidArgument(
        f'monitor="{monitor}": Keras does not say whether more of it is better; pass mode="min" or '
        'mode="max"'
    )


def scalar(logs: Mapping[str, Any], monitor: str) -> float | None:
    """The monitored value as a number; None, with a warning, where there is none."""
    value = logs.get(monitor)
    if value is None:
        there = ", ".join(sorted(logs)) or "none"
        _warn(f"the metric {monitor} is not available, only: {there}")
        return None
    array = np.asarray(value)
    if array.ndim > 0:
        _warn(f"the metric {monitor} is no single number but has shape {list(array.shape)}")
        return None
    return float(array)


def is_better(value: float, than: float | None, direction: Direction) -> bool:
    """Whether `value` is an improvement; NaN never is, and anything is better than nothing."""
    if math.isnan(value):
        return False
    if than is None or math.isnan(than):
        return True
    return value < than if direction == "min" else value > than


def best_of(
    entries: Iterable[Mapping[str, Any]], monitor: str, direction: Direction
) -> float | None:
    """The best value of `monitor` in the manifests of a run (see list_run())."""
    best: float | None = None
    for entry in entries:
        value = float(entry["metrics"].get(monitor, "nan"))
        if entry["damage"] is None and is_better(value, best, direction):
            best = value
    return best


def _metrics_of(metrics: Iterable[Any]) -> Iterable[Any]:
    for metric in metrics:
        # CompileMetrics and MetricsList hold those that the user named.
        inner = getattr(metric, "metrics", None)
        yield from inner if inner else [metric]


def _warn(text: str) -> None:
    warnings.warn(text, StillframeWarning, stacklevel=4)
