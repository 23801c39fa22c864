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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras.src.saving import saving_lib

from stillframe._core.arguments import check_choice
from stillframe._core.layout import PartSpec, TensorSpec
from stillframe._core.saved import SavedCheckpoint
from stillframe._core.saver import Saver, SaverOptions
from stillframe._core.session import AttachOptions, list_run
from stillframe._core.state_json import Encoder, decode, dumps
from stillframe._core.ticket import Ticket
from stillframe._core.warn import warn
from stillframe._keras.fill import fill
from stillframe._keras.held_values import Capture, HeldContent, save_held
from stillframe._keras.read import read_values
from stillframe._keras.state import FORMAT, KerasState
from stillframe._keras.values import as_array, pin, spec_of
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
        return save_held(
            self.saver,
            lambda: self._content(model, extra),
            step=step,
            metrics=metrics,
            capture=self._capture,
        )

    def _content(self, model: Any, extra: Any) -> HeldContent:
        state = self._state_of(model)
        text, arrays = self._encode(model, state, extra)
        values = [
            pin(one.value if one.holder is None else one.holder, one.spec) for one in state.tensors
        ]
        values += [pin(array, spec) for spec, array in arrays]
        return HeldContent([*state.parts, *_extra_part(arrays)], values, text)

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


def _extra_part(arrays: Sequence[tuple[TensorSpec, Any]]) -> list[PartSpec]:
    return [PartSpec("extra", tuple(spec for spec, _ in arrays), (FORMAT,))] if arrays else []


def _read_arrays(saved: SavedCheckpoint) -> dict[str, npt.NDArray[Any]]:
    """The arrays of `extra`, by name."""
    values = read_values(saved, ("extra",))
    return {name: as_array(saved.tensors["extra"][name].spec, one) for name, one in values.items()}
