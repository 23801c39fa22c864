"""The objects that a Checkpointer saves: checked, and by name.

Three kinds: models and optimizers, whose tensors are copied from where they are; modules beside
them (an EMA), likewise; and all that has state_dict() and load_state_dict(), section by section.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from stillframe._torch.generators import GeneratorState
from stillframe._torch.tensors import check_name
from stillframe.errors import InvalidArgument

# What `only=` can name, and the argument that each comes from.
SECTIONS = (
    "model",
    "optimizer",
    "scheduler",
    "scaler",
    "ema",
    "loader",
    "state",
    "generators",
    "rng",
)
# In this order they are saved and loaded: generators after all that may draw from them.
STATEFUL_SECTIONS = ("scheduler", "scaler", "ema", "loader", "state", "generators")
# Names of parts, with which the names of their tensors begin.
_PART_NAMES = ("optimizer", "ema", "extra")


class Stateful(Protocol):
    """A scheduler, or anything else with a state of its own."""

    def state_dict(self) -> Any:
        """Return the state, as plain values and tensors."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take a state back."""


@dataclasses.dataclass(frozen=True)
class Members:
    """What is saved and restored. The key None stands for one object that has no name.

    Attributes:
        ema: those that are plain modules, whose tensors make a part of their own.
        stateful: by section, then by name.
        named: the sections that were given as a dict.
    """

    models: dict[str | None, nn.Module]
    optimizers: dict[str | None, Optimizer]
    ema: dict[str | None, nn.Module]
    stateful: dict[str, dict[str | None, Any]]
    named: tuple[str, ...]

    def given(self) -> set[str]:
        """The sections that were given at all, but for "rng", which always is."""
        given = set(self.stateful) | {"model"}
        if self.optimizers:
            given.add("optimizer")
        if self.ema:
            given.add("ema")
        return given


def collect_members(
    *,
    model: Any,
    optimizer: Any,
    scheduler: Any,
    scaler: Any,
    ema: Any,
    loader: Any,
    generators: Any,
    state: Any,
) -> Members:
    """Check the arguments of a Checkpointer.

    Raises:
        InvalidArgument: one is of another kind, or has a name that cannot be used.
    """
    models = _named("model", model, nn.Module)
    if not models:
        raise InvalidArgument("model= is an empty dict")
    for name in models:
        if name in _PART_NAMES:
            raise InvalidArgument(f"the model name {name!r} is that of a part; take another one")
    if state is not None and not isinstance(state, Mapping):
        raise InvalidArgument(
            f"state= is a {type(state).__qualname__}, not a dict of objects with state_dict()"
        )
    averages = _named("ema", ema, None)
    given = {
        "scheduler": _named("scheduler", scheduler, None),
        "scaler": _named("scaler", scaler, None),
        "ema": {name: one for name, one in averages.items() if not _is_plain_module(one)},
        "loader": _named("loader", loader, None),
        "state": _named("state", state, None),
        "generators": _generators(generators),
    }
    sections = {
        "model": models,
        "optimizer": _named("optimizer", optimizer, Optimizer),
        **given,
        "ema": averages,
    }
    return Members(
        models=models,
        optimizers=sections["optimizer"],
        ema={name: one for name, one in averages.items() if _is_plain_module(one)},
        stateful={section: objects for section, objects in given.items() if objects},
        named=tuple(s for s in SECTIONS if sections.get(s) and None not in sections[s]),
    )


def member_path(section: str, name: str | None) -> str:
    """How messages and tensor names call one object: `scheduler`, or `scheduler.g`."""
    return section if name is None else f"{section}.{name}"


def _named(what: str, given: Any, kind: type | None) -> dict[str | None, Any]:
    """One object as {None: object}; a dict of them with checked names."""
    if given is None:
        return {}
    # A module may be a mapping itself (nn.ModuleDict is not, but users write such classes).
    if _fits(given, kind):
        return {None: given}
    if not isinstance(given, Mapping):
        wanted = kind.__qualname__ if kind is not None else "object with state_dict()"
        raise InvalidArgument(f"{what}= is a {type(given).__qualname__}, not a(n) {wanted}")
    for name, value in given.items():
        check_name(what, name)
        if not _fits(value, kind):
            raise InvalidArgument(f"{what}[{name!r}] is a {type(value).__qualname__}")
    return dict(given)


def _fits(value: Any, kind: type | None) -> bool:
    if kind is not None:
        return isinstance(value, kind)
    has_state = hasattr(value, "state_dict") and hasattr(value, "load_state_dict")
    return has_state and not isinstance(value, type)


def _generators(given: Any) -> dict[str | None, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        return {None: GeneratorState("generators", given)}
    for name in given:
        check_name("generators", name)
    return {name: GeneratorState(f"generators.{name}", one) for name, one in given.items()}


# A module that overrides one of these has state that a walk over its tensors does not see.
_STATE_METHODS: Sequence[str] = (
    "state_dict",
    "load_state_dict",
    "_save_to_state_dict",
    "_load_from_state_dict",
    "get_extra_state",
)


def _is_plain_module(one: Any) -> bool:
    if not isinstance(one, nn.Module):
        return False
    kinds = set(map(type, one.modules()))
    # BatchNorm's only adds a counter that old files lack.
    kinds = {kind for kind in kinds if not kind.__module__.startswith("torch.nn.")}
    return all(
        getattr(kind, method) is getattr(nn.Module, method)
        for kind in kinds
        for method in _STATE_METHODS
    )
