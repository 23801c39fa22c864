"""The variables of a Keras model, named by where they stand in it.

Variable paths contain automatic names: the second equal model of a process has other ones. Keras's
own weight files are therefore keyed by structure, and so are we, by the same walk (keras
saving_lib): "layers/dense/0" is the first variable of the first Dense layer. The path is kept as a
label for people.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras.src.saving import saving_lib

from stillframe._core.layout import PartSpec, TensorSpec
from stillframe._keras.assets import PART as ASSETS_PART
from stillframe._keras.assets import write_assets
from stillframe._keras.values import spec_of
from stillframe.errors import InvalidArgument

FORMAT: tuple[str, str] = ("format", "keras")


@dataclasses.dataclass(frozen=True, slots=True)
class StateTensor:
    """One tensor of the state.

    Attributes:
        holder: the Keras variable that has the value; None for a value that a layer made for the
            occasion in a save_own_variables() of its own, or an asset.
        value: that value, if there is no holder.
        label: Keras's path of the variable, or "".
    """

    spec: TensorSpec
    holder: Any
    value: Any
    label: str


class KerasState:
    """All variables of a model now, by part.

    Args:
        model: a built model.
        sections: which of "model", "optimizer", "metrics", "assets".

    Attributes:
        parts: the layout, in the order of `tensors`.
        tensors: in the order of the file.

    Raises:
        InvalidArgument: the model is not built, or a variable cannot be saved; it is named.
    """

    def __init__(self, model: Any, sections: Sequence[str] = ("model", "optimizer")) -> None:
        if not model.built:
            raise InvalidArgument(
                f"model {model.name!r} is not built, so it has no weights yet; call build() or fit "
                "one batch first"
            )
        self.parts: list[PartSpec] = []
        self.tensors: list[StateTensor] = []
        self.labels: dict[str, str] = {}
        optimizer = getattr(model, "optimizer", None) if "optimizer" in sections else None
        if "model" in sections:
            self._add("model", _model_tensors(model))
        # One that has not been built yet has nothing that a new one would not have.
        if optimizer is not None and optimizer.built:
            self._add("optimizer", _listed("optimizer", optimizer.variables))
        if "metrics" in sections and model.metrics_variables:
            self._add("metrics", _listed("metrics", model.metrics_variables))
        if "assets" in sections:
            assets = [
                StateTensor(spec_of(name, content), None, content, "")
                for name, content in write_assets(model)
            ]
            if assets:
                self._add(ASSETS_PART, iter(assets))

    def _add(self, part: str, tensors: Iterator[StateTensor]) -> None:
        ordered = sorted(tensors, key=lambda tensor: tensor.spec.file_order)
        self.parts.append(PartSpec(part, tuple(one.spec for one in ordered), (FORMAT,)))
        self.tensors += ordered
        self.labels.update({one.spec.name: one.label for one in ordered if one.label})

    @property
    def has_values(self) -> bool:
        """Whether some tensors are values made for this occasion."""
        return any(tensor.holder is None for tensor in self.tensors)

    def by_name(self) -> dict[str, StateTensor]:
        """The tensors by name; no name occurs in two parts."""
        return {tensor.spec.name: tensor for tensor in self.tensors}


def _model_tensors(model: Any) -> Iterator[StateTensor]:
    """Weights as Keras's weight files have them, then what those leave out (seed generators)."""
    store = WeightStore()
    # The optimizer has a part of its own; metrics are no weights.
    skipped = {id(one) for one in (getattr(model, "optimizer", None), *model.metrics) if one}
    saving_lib._save_state(model, store, None, "", skipped)
    known: set[int] = set()
    for path, entries in store.groups.items():
        for key, value in entries.items():
            name = f"{path}/{key}" if path else key
            if isinstance(value, keras.Variable):
                if id(value) in known:
                    continue
                known.add(id(value))
                yield StateTensor(spec_of(name, value), value, None, value.path)
            else:
                array = np.asarray(value)
                yield StateTensor(spec_of(name, array), None, array, "")
    rest = [variable for variable in model.variables if id(variable) not in known]
    yield from _listed("rest", rest)


def _listed(prefix: str, variables: Sequence[Any]) -> Iterator[StateTensor]:
    for index, variable in enumerate(variables):
        name = f"{prefix}.{index}"
        yield StateTensor(spec_of(name, variable), variable, None, variable.path)


class WeightStore(saving_lib.NpzIOStore):  # type: ignore[misc]
    """A store for Keras's walk that keeps the variables themselves, by group.

    Keras asks for one of its own kinds of store; nothing of the base is used.
    """

    def __init__(self, groups: dict[str, dict[str, Any]] | None = None) -> None:
        self.groups: dict[str, dict[str, Any]] = {} if groups is None else groups

    def make(self, path: str, metadata: Any = None) -> dict[str, Any]:
        """A new group."""
        return self.groups.setdefault(path, {})

    def get(self, path: str) -> dict[str, Any]:
        """The group, empty if there is none."""
        return self.groups.get(path, {})

    def has_path(self, path: str) -> bool:
        """Whether the group or one below it exists."""
        return any(one == path or one.startswith(f"{path}/") for one in self.groups)

    def close(self) -> None:
        """Nothing is open."""
