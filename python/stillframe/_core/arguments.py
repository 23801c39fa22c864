"""Checks of what a caller passes, the same for every framework."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

from stillframe.errors import InvalidArgument

_STEP_MAX = 2**63 - 1
# docs/FORMAT.md section 4.
_METRIC_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]+")


def check_choice(what: str, value: object, choices: Sequence[str]) -> None:
    """Raise InvalidArgument unless `value` is one of `choices`."""
    if value not in choices:
        listed = " or ".join(f'"{choice}"' for choice in choices)
        raise InvalidArgument(f"{what} is {value!r}, not {listed}")


def checked_step(step: int) -> int:
    """The step as an int.

    Raises:
        InvalidArgument: it is not an integer, or not 0 to 2^63 - 1.
    """
    try:
        checked = operator.index(step)
    except TypeError:
        raise InvalidArgument(f"step is {step!r}, not an integer") from None
    if not 0 <= checked <= _STEP_MAX:
        raise InvalidArgument(f"step is {checked}; it must be 0 or more, and below 2^63")
    return checked


def checked_metrics(metrics: Mapping[str, Any] | None) -> list[tuple[str, float]]:
    """Names and values as floats; 0-d tensors and arrays are taken too.

    Raises:
        InvalidArgument: a name or a value is not what a manifest can hold; the message names it.
    """
    checked = []
    for name, value in (metrics or {}).items():
        check_metric_name(name)
        checked.append((name, number_of(name, value)))
    return checked


def check_metric_name(name: object) -> None:
    """Raise InvalidArgument unless a manifest can hold the name."""
    is_text = isinstance(name, str) and _METRIC_NAME.fullmatch(name) is not None
    if not is_text or len(str(name).encode()) > 256:
        raise InvalidArgument(
            f"the metric name {name!r} is not 1 to 256 bytes of UTF-8 without control characters"
        )


def number_of(name: str, value: Any) -> float:
    """A metric's value as a float; 0-d tensors and arrays are taken too.

    Raises:
        InvalidArgument: it is not a number; the message names the metric.
    """
    try:
        if isinstance(value, str | bytes):
            raise TypeError(f"it is a {type(value).__name__}")
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InvalidArgument(f"the metric {name} is {value!r}, not a number: {error}") from None
