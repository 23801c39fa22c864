"""One random number generator's state as plain values: torch's, NumPy's or Python's own."""

from __future__ import annotations

import array
import random
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from stillframe._core.state_json import UNFIT
from stillframe.errors import DataLoss, InvalidArgument


class GeneratorState:
    """Gives a generator state_dict() and load_state_dict().

    Args:
        path: for messages.
        generator: a torch.Generator, np.random.Generator, np.random.RandomState or random.Random.

    Raises:
        InvalidArgument: it is something else, or has no state (random.SystemRandom).
    """

    def __init__(self, path: str, generator: Any) -> None:
        self._path = path
        self._generator = generator
        self._kind = _kind_of(path, generator)

    def state_dict(self) -> dict[str, Any]:
        """The state, with the kind of generator that it belongs to."""
        one = self._generator
        if isinstance(one, torch.Generator):
            return {
                "kind": self._kind,
                "device": one.device.type,
                "state": one.get_state().numpy().tobytes(),
            }
        if isinstance(one, random.Random):
            return {"kind": self._kind, **python_state(one.getstate())}
        if isinstance(one, np.random.RandomState):
            return {"kind": self._kind, "state": _plain(one.get_state(legacy=False))}
        return {"kind": self._kind, "state": _plain(one.bit_generator.state)}

    def mismatch(self, state: Any) -> str | None:
        """Why this generator cannot take the state; None if it can."""
        wanted = self.state_dict()
        if not isinstance(state, Mapping) or any(
            state.get(key) != wanted.get(key) for key in ("kind", "device")
        ):
            told = _told(state) if isinstance(state, Mapping) else repr(state)
            return f"{self._path} is a {_told(wanted)}, in the checkpoint a {told}"
        return None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the generator; mismatch() tells before whether it can.

        Raises:
            DataLoss: the state is none.
        """
        one = self._generator
        try:
            if isinstance(one, torch.Generator):
                one.set_state(torch.frombuffer(bytearray(state["state"]), dtype=torch.uint8))
            elif isinstance(one, random.Random):
                one.setstate(python_state_back(state))
            elif isinstance(one, np.random.RandomState):
                one.set_state(state["state"])
            else:
                one.bit_generator.state = state["state"]
        except UNFIT as error:
            raise DataLoss(f"state.json: {self._path} cannot be restored: {error}") from error


def python_state(state: Any) -> dict[str, Any]:
    """random.getstate() with its 625 words as bytes."""
    version, words, gauss = state
    return {"version": version, "words": _little_endian(words), "gauss": gauss}


def python_state_back(state: Mapping[str, Any]) -> tuple[Any, ...]:
    """What random.setstate() takes."""
    return (state["version"], _words(state["words"]), state["gauss"])


def _kind_of(path: str, generator: Any) -> str:
    if isinstance(generator, torch.Generator):
        return "torch.Generator"
    if isinstance(generator, random.Random) and not isinstance(generator, random.SystemRandom):
        return "random.Random"
    if isinstance(generator, np.random.RandomState):
        return f"numpy.RandomState.{type(generator._bit_generator).__name__}"
    if isinstance(generator, np.random.Generator):
        return f"numpy.Generator.{type(generator.bit_generator).__name__}"
    raise InvalidArgument(
        f"{path} is a {type(generator).__module__}.{type(generator).__qualname__}, not a "
        "torch.Generator, np.random.Generator, np.random.RandomState or random.Random"
    )


def _told(state: Mapping[str, Any]) -> str:
    device = state.get("device")
    return f"{state.get('kind')}" + (f" on {device}" if device else "")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _little_endian(words: Any) -> bytes:
    packed = array.array("I", words)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _words(data: bytes) -> tuple[int, ...]:
    packed = array.array("I", data)
    if sys.byteorder == "big":
        packed.byteswap()
    return tuple(packed)
