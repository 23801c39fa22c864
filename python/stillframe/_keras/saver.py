"""KerasRun: one run's saves and restores of a Keras model, below the callbacks.

On the CPU a save is eager: every variable is copied before save() returns, in native code, which
measures faster than holding references while training allocates new memory for its updates. With
capture="lazy" each variable's value is held, which later assignments cannot change (TensorFlow
copies on write, JAX arrays never change), and copied while training runs; so are those of GPUs
on TensorFlow with either.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras.src.layers.convolutional.base_conv import BaseConv
from keras.src.saving import saving_lib

from stillframe._core.arguments import check_choice, checked_metrics, checked_step
from stillframe._core.layout import PartSpec, TensorSpec
from stillframe._core.saved import SavedCheckpoint
from stillframe._core.saver import Content, Saver, SaverOptions
from stillframe._core.session import AttachOptions, list_run
from stillframe._core.state_json import Encoder, decode, dumps
from stillframe._core.ticket import Ticket
from stillframe._core.warn import warn
from stillframe._keras.assets import PART as ASSETS_PART
from stillframe._keras.held_values import Capture, HeldValues
from stillframe._keras.read import BackgroundReader, read_values
from stillframe._keras.state import FORMAT, KerasState, WeightStore
from stillframe._keras.values import as_array, assign, pin, spec_of
from stillframe.errors import DataLoss, InvalidArgument


@dataclasses.dataclass(frozen=True)
class KerasRestored:
    """What a restore gave.

    Attributes:
        step: as given to save().
        sequence: the checkpoint's place in its run.
        metrics: as given to save(), as floats.
        extra: as given to save().
        directory: of the checkpoint.
    """

    step: int
    sequence: int
    metrics: dict[str, float]
    extra: Any
    directory: Path


class KerasRun:
    """Saves a model's variables to a run, and gets them back into an equal model.

    Args:
        options: the run and its retention.
        how: waiting and failing, as for the Checkpointer.
        capture: see the module.
        sections: what a save holds, of "model", "optimizer", "metrics".
    """

    def __init__(
        self,
        options: AttachOptions,
        how: SaverOptions,
        *,
        capture: Capture = "eager",
        sections: Sequence[str] = ("model", "optimizer"),
    ) -> None:
        check_choice("capture", capture, ("eager", "lazy"))
        if capture == "lazy" and keras.backend.backend() == "torch":
            raise InvalidArgument(
                'capture="lazy" needs values that assignments do not change, which Keras on torch '
                "does not have; leave it out"
            )
        self.saver = Saver(options, how)
        self._capture = capture
        self._sections = sections
        self._model: Any = None
        self._config = ""
        self._state: KerasState | None = None
        self._known: list[int] = []

    def prepare(self, model: Any, extra: Any = None) -> None:
        """Let the daemon's memory be made ready while the first batches train.

        Args:
            model: as for save().
            extra: of the form that saves will have.
        """
        try:
            state = self._state_of(model)
            _, arrays = self._encode(model, state, extra)
        except InvalidArgument:
            return  # The save says it.
        with self.saver.attach().lock:
            self.saver.register_early([*state.parts, *_extra_part(arrays)])

    def save(
        self,
        model: Any,
        step: int,
        *,
        metrics: Mapping[str, Any] | None = None,
        extra: Any = None,
    ) -> Ticket:
        """Save the model's variables of now; see Checkpointer.save() for tickets and errors."""
        begin = time.perf_counter()
        self.saver.check_usable()
        known_step = checked_step(step)
        known_metrics = checked_metrics(metrics)
        with self.saver.attach().lock:
            self.saver.make_ready()
            state = self._state_of(model)
            text, arrays = self._encode(model, state, extra)
            values = [
                pin(one.value if one.holder is None else one.holder, one.spec)
                for one in state.tensors
            ]
            values += [pin(array, spec) for spec, array in arrays]
            held = HeldValues.of(values, self._capture)
            parts = [*state.parts, *_extra_part(arrays)]
            ticket = self.saver.begin(
                Content(parts, held.sources, text, streams=held.streams),
                step=known_step,
                metrics=known_metrics,
                capture=held.capture,
                lazy=held.lazy,
            )
            ticket._call_seconds = time.perf_counter() - begin
            return ticket

    def find(self) -> KerasRestored | None:
        """What the newest intact checkpoint says besides its variables; None if there is none.

        A newer one that is damaged is warned of.

        Raises:
            DataLoss: there are checkpoints, but none is intact.
        """
        session = self.saver.attach()
        damages: list[str] = []
        with session.lock:
            for entry in reversed(list_run(self.saver.options.directory)):
                selector = str(entry["sequence"])
                try:
                    if entry["damage"] is not None:
                        raise DataLoss(str(entry["damage"]))
                    with SavedCheckpoint(self.saver.options.directory, selector, session) as saved:
                        found = self._described(saved)
                except DataLoss as error:
                    damages.append(f"checkpoint {selector}: {error}")
                    continue
                if damages:
                    warn(f"{'; '.join(damages)}; step {found.step} is taken instead")
                return found
        if damages:
            raise DataLoss(f"{self.saver.options.directory}: {'; '.join(damages)}")
        return None

    def restore(
        self, model: Any, selector: str = "latest", *, sections: Sequence[str] | None = None
    ) -> None:
        """Fill the model's variables from a checkpoint of the run.

        Args:
            model: built, with the architecture of the one that was saved.
            selector: as after RUN@ on the command line.
            sections: which parts to take; None: those of this object.

        Raises:
            InvalidArgument: variables differ: all are listed by path, nothing was assigned.
            NotFound: there is no such checkpoint.
            DataLoss: it is damaged.
        """
        session = self.saver.attach()
        with (
            session.lock,
            SavedCheckpoint(self.saver.options.directory, selector, session) as saved,
        ):
            fill(model, saved, sections or self._sections)

    def _described(self, saved: SavedCheckpoint) -> KerasRestored:
        arrays = _read_arrays(saved)
        sequence = saved.manifest["sequence"]
        entries = list_run(self.saver.options.directory)
        return KerasRestored(
            step=saved.manifest["step"],
            sequence=sequence,
            metrics={name: float(value) for name, value in saved.manifest["metrics"].items()},
            extra=decode(saved.state.get("extra"), "extra", tensor=arrays.__getitem__),
            directory=Path(next(one["path"] for one in entries if one["sequence"] == sequence)),
        )

    def _state_of(self, model: Any) -> KerasState:
        """Walking a model takes milliseconds: done again only if its variables are others."""
        variables = [*model.variables, *model.metrics_variables]
        if getattr(model, "optimizer", None) is not None:
            variables += model.optimizer.variables
        known = list(map(id, variables))
        if self._state is None or self._known != known or self._state.has_values:
            self._state = KerasState(model, self._sections)
            self._known = known
        return self._state

    def _encode(
        self, model: Any, state: KerasState, extra: Any
    ) -> tuple[bytes, list[tuple[TensorSpec, npt.NDArray[Any]]]]:
        """state.json, and the arrays of `extra` in the order of their part."""
        if self._model is not model:
            self._model, self._config = model, config_text(model)
        arrays: list[tuple[TensorSpec, npt.NDArray[Any]]] = []

        def lift(path: str, array: Any) -> str:
            if not isinstance(array, np.ndarray):
                raise InvalidArgument(f"{path} is a torch tensor; save it as a NumPy array")
            arrays.append((spec_of(path, array), array))
            return path

        encoder = Encoder(lift, lifts_arrays=True)
        members = [
            '"format_version": 1',
            f'"keras": {{"config": {self._config}, "labels": {dumps(state.labels)}}}',
        ]
        if extra is not None:
            members.append(f'"extra": {dumps(encoder.encode(extra, "extra"))}')
        arrays.sort(key=lambda pair: pair[0].file_order)
        return f"{{{', '.join(members)}}}\n".encode(), arrays


def config_text(model: Any) -> str:
    """How to build the model again: JSON of Keras's own config text and the versions."""
    text, _ = saving_lib._serialize_model_as_json(model)
    return json.dumps(
        {
            "config": text,
            "keras_version": keras.__version__,
            "backend": keras.backend.backend(),
            "python_version": platform.python_version(),
        }
    )


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


def _extra_part(arrays: Sequence[tuple[TensorSpec, Any]]) -> list[PartSpec]:
    return [PartSpec("extra", tuple(spec for spec, _ in arrays), (FORMAT,))] if arrays else []


def _read_arrays(saved: SavedCheckpoint) -> dict[str, npt.NDArray[Any]]:
    """The arrays of `extra`, by name."""
    values = read_values(saved, ("extra",))
    return {name: as_array(saved.tensors["extra"][name].spec, one) for name, one in values.items()}
