"""Restoring what has load_state_dict(): the only step of a restore that the user's code can refuse.

It therefore comes first, before a tensor of a model is written, and is taken back if one refuses.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

from stillframe._core.saved import SavedCheckpoint
from stillframe._core.state_json import decode
from stillframe._core.warn import log
from stillframe._torch.generators import GeneratorState
from stillframe._torch.members import STATEFUL_SECTIONS, Members, member_path
from stillframe._torch.restore_plan import Problems, Targets
from stillframe._torch.rng import restore_rng, rng_state
from stillframe._torch.tensors import ModelTensors
from stillframe.errors import InvalidArgument, StillframeError


@dataclasses.dataclass
class _Loading:
    """One object that takes a state, and how to give it its own back."""

    path: str
    get: Callable[[], Any]
    set: Callable[[Any], Any]
    value: Any
    undo: Callable[[], None] | None = None


class MembersPlan:
    """Pairs what has load_state_dict() with a checkpoint's states.

    Args:
        saved: the checkpoint.
        members: what is there to be filled.
        targets: of new memory: tensors in the states are read into it before load().
        problems: takes what differs.
        allow_pickle: load pickles.
    """

    def __init__(
        self,
        saved: SavedCheckpoint,
        members: Members,
        targets: Targets,
        problems: Problems,
        *,
        allow_pickle: bool,
    ) -> None:
        self._saved = saved
        self._members = members
        self._targets = targets
        self._problems = problems
        self._allow_pickle = allow_pickle
        self._loadings: list[_Loading] = []

    def plan(self, sections: frozenset[str], models: ModelTensors) -> None:
        """Compare, and ask for the tensors that the states hold."""
        if "model" in sections:
            self._plan_extra_states(models)
        for section in STATEFUL_SECTIONS:
            if section in sections:
                self._plan_section(section)

    def plan_rng(self, state: Any) -> None:
        """Set the process's generators too, after all that may draw from them while it loads."""
        self._loadings.append(_Loading("rng", rng_state, restore_rng, state))

    def load(self) -> None:
        """Give each object its state, once the tensors have been read.

        Raises:
            InvalidArgument: one refused; those before have their own states again.
        """
        for loading in self._loadings:
            loading.undo = _undo(loading)
            try:
                loading.set(loading.value)
            except Exception as error:
                self.roll_back()
                if isinstance(error, StillframeError):
                    raise
                raise InvalidArgument(
                    f"{loading.path} refused its state in the checkpoint, and nothing was "
                    f"restored: {error!r}; only= can leave it out"
                ) from error

    def roll_back(self) -> None:
        """Give back what load() has replaced."""
        for loading in reversed(self._loadings):
            undo, loading.undo = loading.undo, None
            if undo is not None:
                undo()

    def _plan_section(self, section: str) -> None:
        objects = self._members.stateful.get(section, {})
        state = self._saved.state.get(section)
        if not objects:
            if state is not None and not (section == "ema" and self._members.ema):
                self._problems.unknown([f"{section} (pass {section}=, or leave it out by only=)"])
            return
        if state is None:
            self._problems.missing([section])
            return
        if None in objects:
            states = {None: state}
        else:
            states = state
            self._problems.missing([f"{section}.{name}" for name in objects if name not in state])
            self._problems.unknown([f"{section}.{name}" for name in state if name not in objects])
        for name, one in objects.items():
            if name not in states:
                continue
            path = member_path(section, name)
            value = self._decode(states[name], path)
            if isinstance(one, GeneratorState):
                mismatch = one.mismatch(value)
                if mismatch is not None:
                    self._problems.other(mismatch)
                    continue
            self._loadings.append(
                _Loading(
                    path,
                    one.state_dict,
                    one.load_state_dict,
                    value
                    if isinstance(one, GeneratorState)
                    else _with_types_of(one.state_dict(), value),
                )
            )

    def _plan_extra_states(self, models: ModelTensors) -> None:
        states = self._saved.state.get("model", {}).get("extra_state", {})
        self._problems.missing(sorted(models.stateful.keys() - states.keys()))
        self._problems.unknown(sorted(states.keys() - models.stateful.keys()))
        for name, module in models.stateful.items():
            if name in states:
                path = f"model.{name}"
                value = self._decode(states[name], path)
                self._loadings.append(
                    _Loading(path, module.get_extra_state, module.set_extra_state, value)
                )

    def _decode(self, value: Any, path: str) -> Any:
        return decode(value, path, tensor=self._targets.add_new, allow_pickle=self._allow_pickle)


def _undo(loading: _Loading) -> Callable[[], None] | None:
    try:
        before = copy.deepcopy(loading.get())
    except Exception as error:
        log.info(
            "%s cannot be copied: %r; a refused restore would not undo it", loading.path, error
        )
        return None
    # A state that is an object's __dict__, as a scheduler's, only adds to it.
    owner = getattr(loading.get, "__self__", None)
    own: dict[str, Any] = getattr(owner, "__dict__", {})
    names = frozenset(own)

    def undo() -> None:
        try:
            loading.set(before)
            for name in own.keys() - names:
                del own[name]
        except Exception as error:
            log.warning("%s does not take its own state back: %r", loading.path, error)

    return undo


def _with_types_of(live: Any, value: Any) -> Any:
    """`value` with Counters where the live state has them, as MultiStepLR needs them."""
    if isinstance(live, Counter) and isinstance(value, dict):
        return Counter(value)
    if isinstance(live, dict) and isinstance(value, dict):
        return {key: _with_types_of(live.get(key), item) for key, item in value.items()}
    if isinstance(live, list) and isinstance(value, list) and len(live) == len(value):
        return [_with_types_of(one, item) for one, item in zip(live, value, strict=True)]
    return value
