"""Filling the variables of a model that is built from a checkpoint: all of them, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras.src.layers.convolutional.base_conv import BaseConv
from keras.src.saving import saving_lib

from stillframe._core.saved import SavedCheckpoint
from stillframe._keras.assets import PART as ASSETS_PART
from stillframe._keras.read import BackgroundReader, read_values
from stillframe._keras.state import KerasState, WeightStore
from stillframe._keras.values import as_array, assign
from stillframe.errors import InvalidArgument


def fill(
    model: Any,
    saved: SavedCheckpoint,
    sections: Sequence[str],
    reader: BackgroundReader | None = None,
    before: Callable[[KerasState], None] | None = None,
) -> None:
    """Assign what `saved` holds to the model's variables, all or nothing.

    Args:
        model: built.
        saved: the checkpoint.
        sections: which parts of it.
        reader: reads these already; None reads them here.
        before: called with what is about to be assigned.
    """
    sections = [one for one in sections if one != ASSETS_PART]  # Which are not variables.
    state = KerasState(model, [one for one in sections if one in saved.tensors])
    _check_pairs(state, saved, sections)
    if before is not None:
        before(state)
    buffers = read_values(saved, sections) if reader is None else reader.wait()
    own: dict[str, dict[str, Any]] = {}
    for one in state.tensors:
        if one.spec.name not in buffers:
            continue
        if one.holder is not None:
            assign(one.holder, one.spec, buffers[one.spec.name])
        else:
            group, _, key = one.spec.name.rpartition("/")
            own.setdefault(group, {})[key] = as_array(one.spec, buffers[one.spec.name])
    if own or _has_own_loader(model):
        _load_own(model, state, own)


def _check_pairs(state: KerasState, saved: SavedCheckpoint, sections: Sequence[str]) -> None:
    wanted = state.by_name()
    there = {
        spec.name: spec for part in saved.parts if part.name in sections for spec in part.tensors
    }
    recipe = saved.state.get("keras", {})
    labels = recipe.get("labels", {})
    lines = [
        f"  {_label(name, one.label)} is not in the checkpoint"
        for name, one in wanted.items()
        if name not in there
        # A stock file lacks the states of seed generators; Keras leaves them as they are then.
        and not (recipe.get("is_stock") and name.startswith("rest."))
    ]
    lines += [
        f"  {_label(name, labels.get(name, ''))} is only in the checkpoint"
        for name in there
        if name not in wanted
    ]
    for name, one in wanted.items():
        spec = there.get(name)
        if spec is not None and (spec.shape, spec.dtype) != (one.spec.shape, one.spec.dtype):
            lines.append(
                f"  {_label(name, one.label)} is {one.spec.dtype} {list(one.spec.shape)}, in the "
                f"checkpoint {spec.dtype} {list(spec.shape)}"
            )
    if lines:
        listed = "\n".join(lines)
        step = saved.manifest["step"]
        raise InvalidArgument(
            f"step {step} does not fit the model, and nothing was assigned; "
            f"{len(lines)} differences:\n{listed}"
        )


# Names of what Keras's walk does not give to any layer.
_NOT_IN_GROUPS = ("optimizer.", "metrics.", "rest.")
# These add nothing to an assignment.
_PLAIN_LOADERS = frozenset(
    kind.load_own_variables
    for kind in (
        keras.layers.Layer,
        keras.layers.Dense,
        keras.layers.EinsumDense,
        keras.layers.Embedding,
        BaseConv,
    )
)


def _has_own_loader(model: Any) -> bool:
    """Whether a layer does more when its variables are loaded, as Normalization does."""
    return any(
        type(layer).load_own_variables not in _PLAIN_LOADERS for layer in model._flatten_layers()
    )


def _load_own(model: Any, state: KerasState, own: dict[str, dict[str, Any]]) -> None:
    """Let layers with a load_own_variables() of their own take their values."""
    groups = dict(own)
    for one in state.tensors:
        group, _, key = one.spec.name.rpartition("/")
        if one.holder is not None and not one.spec.name.startswith(_NOT_IN_GROUPS):
            groups.setdefault(group, {})[key] = one.holder
    # Neither is in the groups, and both have been assigned.
    done = {id(one) for one in (getattr(model, "optimizer", None), *model.metrics) if one}
    saving_lib._load_state(model, WeightStore(groups), None, "", visited_saveables=done)


def _label(name: str, path: str) -> str:
    return f"{path} ({name})" if path else name
