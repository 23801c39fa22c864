"""The state of other callbacks: what EarlyStopping, ReduceLROnPlateau and their like count.

A callback with get_state() and set_state(), or state_dict() and load_state_dict(), says itself what
its state is. Of others it is their attributes that are plain values or arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stillframe.errors import InvalidArgument

State = dict[str, Any]

_PLAIN = (type(None), bool, int, float, str, np.generic, np.ndarray)
_OWN_METHODS = (("get_state", "set_state"), ("state_dict", "load_state_dict"))
# Keras sets these anew in every fit().
_NOT_STATE = frozenset({"params", "validation_data"})


def names_of(callbacks: Sequence[Any]) -> list[str]:
    """A name for each that is the same in the next process: its class, and a number if needed."""
    counts: dict[str, int] = {}
    names = []
    for callback in callbacks:
        kind = type(callback).__name__
        counts[kind] = counts.get(kind, 0) + 1
        names.append(kind if counts[kind] == 1 else f"{kind}_{counts[kind]}")
    return names


def get_states(callbacks: Sequence[Any]) -> dict[str, State]:
    """The states of all, by name; they share no memory with the callbacks."""
    return {
        name: _get(callback) for name, callback in zip(names_of(callbacks), callbacks, strict=True)
    }


def check_states(callbacks: Sequence[Any], states: dict[str, State]) -> None:
    """Raise InvalidArgument unless there is a state for each callback and the other way round."""
    names = names_of(callbacks)
    if sorted(names) != sorted(states):
        raise InvalidArgument(
            f"callbacks= names {', '.join(names) or 'none'}; the checkpoint has the states of "
            f"{', '.join(states) or 'none'}: pass equal ones, in the same order"
        )


def set_states(callbacks: Sequence[Any], states: dict[str, State]) -> None:
    """Give each its state back."""
    for name, callback in zip(names_of(callbacks), callbacks, strict=True):
        _set(callback, states[name])


def _get(callback: Any) -> State:
    for getter, setter in _OWN_METHODS:
        if hasattr(callback, getter) and hasattr(callback, setter):
            return {"own": getattr(callback, getter)()}
    attributes = {
        name: _copy(value)
        for name, value in vars(callback).items()
        if name not in _NOT_STATE and _is_plain(value)
    }
    # Keras's monitoring callbacks choose it late, and turn min_delta's sign when they do.
    has_monitor_op = getattr(callback, "monitor_op", None) is not None
    return {"attributes": attributes, "has_monitor_op": has_monitor_op}


def _set(callback: Any, state: State) -> None:
    if "own" in state:
        for getter, setter in _OWN_METHODS:
            if hasattr(callback, getter) and hasattr(callback, setter):
                getattr(callback, setter)(state["own"])
                return
    if state["has_monitor_op"] and callback.monitor_op is None:
        callback._set_monitor_op()
    for name, value in state["attributes"].items():
        setattr(callback, name, value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) and _is_plain(one) for key, one in value.items())
    return isinstance(value, _PLAIN)


def _copy(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {key: _copy(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_copy(one) for one in value]
    return value
