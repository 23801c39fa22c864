"""stillframe.keras.ModelCheckpoint: Keras's callback of that name, through the daemon."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np

from stillframe._core.arguments import check_choice
from stillframe._core.saver import SaverOptions
from stillframe._core.session import AttachOptions, list_run
from stillframe._core.ticket import Ticket
from stillframe._keras.held_values import Capture
from stillframe._keras.links import Links
from stillframe._keras.monitor import Direction, best_of, direction_of, is_better, scalar
from stillframe._keras.run import KerasRun
from stillframe.errors import InvalidArgument, StillframeError


class ModelCheckpoint(keras.callbacks.Callback):  # type: ignore[misc]
    """Saves the model of a fit() while it trains on; takes keras.callbacks.ModelCheckpoint's place.

    The directory of `filepath` is the run: it holds the checkpoints, each with the weights as
    `model.safetensors` and the model's configuration. The formatted name becomes a link to its
    checkpoint as soon as that is durable, and `stillframe.keras.load_model(name)` opens it.

    The best value so far is taken from the checkpoints that are there, so a run that is started
    again does not overwrite its best model with a worse one. NaN is never best. on_train_end()
    waits until the last save is durable.

    Args:
        filepath: where to, with {epoch}, {batch} (both from 1 on) and metrics as in Keras, such as
            "runs/digits/{epoch:02d}-{val_loss:.2f}.keras"; ends in ".keras", or in ".weights.h5"
            with save_weights_only=True.
        monitor: the metric that tells what is better.
        verbose: 1 prints what is done.
        save_best_only: save only what improves on the best.
        save_weights_only: without the optimizer's state.
        mode: "min", "max", or "auto" by the metric's name.
        save_freq: "epoch", or a number of batches.
        initial_value_threshold: the value to improve on before there is any checkpoint.
        keep_last: how many of the newest checkpoints stay; None keeps all. With save_best_only and
            a `filepath` without placeholders this is 1, as each save takes the place of the one
            before.
        keep_best: how many of the best by `monitor` stay besides.
        capture: "eager" copies before training goes on; "lazy" holds the values meanwhile. Values
            on GPUs are held with either, on TensorFlow.
        on_error: "warn" of failed saves; "raise" raises them at the next save and at the end.

    Raises:
        InvalidArgument: an argument is wrong.
    """

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        save_weights_only: bool = False,
        mode: Literal["auto", "min", "max"] = "auto",
        save_freq: Literal["epoch"] | int = "epoch",
        initial_value_threshold: float | None = None,
        *,
        keep_last: int | None = None,
        keep_best: int = 0,
        capture: Capture = "eager",
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        super().__init__()
        check_choice("mode", mode, ("auto", "min", "max"))
        check_choice("on_error", on_error, ("warn", "raise"))
        if save_freq != "epoch" and (not isinstance(save_freq, int) or save_freq < 1):
            raise InvalidArgument(f'save_freq is {save_freq!r}, not "epoch" or a number of batches')
        if keep_last is not None and keep_last < 1:
            raise InvalidArgument(f"keep_last is {keep_last}; it must be 1 or more, or None")
        self.filepath = os.fspath(filepath)
        ending = ".weights.h5" if save_weights_only else ".keras"
        if not self.filepath.endswith(ending):
            raise InvalidArgument(f"filepath is {self.filepath!r}; it must end in {ending}")
        directory, self._name = os.path.split(os.path.abspath(self.filepath))
        if "{" in directory:
            raise InvalidArgument(
                f"filepath is {self.filepath!r}: placeholders may stand in its last part only, "
                "since its directory is the run"
            )
        self.monitor = monitor
        self.mode = mode
        self.verbose = verbose
        self.save_best_only = save_best_only
        self.save_weights_only = save_weights_only
        self.save_freq = save_freq
        self.best = initial_value_threshold
        self._direction: Direction | None = None
        if keep_last is None and "{" not in self._name:
            keep_last = 1
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._capture = capture
        self._how = SaverOptions(on_error=on_error)
        self._run_directory = Path(directory)
        self._run: KerasRun | None = None
        self._links = Links(self._run_directory)
        self._pending: list[tuple[str, Ticket]] = []
        self._epoch = 0
        self._batches = 0
        self._last_batch: int | None = None

    # --- What Keras calls -------------------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        """Attach to the run, so that a directory that cannot be used is known at once."""
        self._run = KerasRun(
            AttachOptions(
                directory=str(self._run_directory),
                keep_last=self._keep_last or 0,
                best=self._best_kept(),
                framework=f"keras {keras.__version__}",
                python_version=platform.python_version(),
            ),
            self._how,
            capture=self._capture,
            sections=("model",) if self.save_weights_only else ("model", "assets", "optimizer"),
        )
        self._run.saver.attach()
        if self.model.built:
            self._run.prepare(self.model, {"epoch": 0})

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Note the epoch, for names."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Save if save_freq batches went by."""
        if self.save_freq == "epoch":
            return
        is_new_epoch = self._last_batch is None or batch <= self._last_batch
        # With steps_per_execution several batches end at once.
        self._batches += batch + 1 if is_new_epoch else batch - (self._last_batch or 0)
        self._last_batch = batch
        if self._batches >= self.save_freq:
            self._batches = 0
            self._save(batch, logs or {})

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Save if save_freq is "epoch"; name what has become durable."""
        if self.save_freq == "epoch":
            self._save(None, logs or {})
        self._name_durable()

    def on_train_end(self, logs: Any = None) -> None:
        """Wait until the last save is durable.

        Raises:
            StillframeError: with on_error="raise": the last save has failed.
        """
        if self._run is None:
            return
        try:
            self._run.saver.close()
        except StillframeError:
            # It was warned of.
            if self._how.on_error == "raise":
                raise
        finally:
            self._name_durable()
            self._run = None

    # --- Saving -----------------------------------------------------------------------------------

    def _save(self, batch: int | None, logs: Mapping[str, Any]) -> None:
        assert self._run is not None
        self._name_durable()
        if self.save_best_only and not self._improves(logs):
            return
        name = self._format(batch, logs)
        self._say(f"capturing the model for {name}")
        ticket = self._run.save(
            self.model, _step_of(self.model), metrics=_numbers(logs), extra={"epoch": self._epoch}
        )
        self._pending.append((name, ticket))

    def _improves(self, logs: Mapping[str, Any]) -> bool:
        value = scalar(logs, self.monitor)
        if value is None:
            return True  # As Keras does, which warns and saves.
        direction = self._known_direction()
        if is_better(value, self.best, direction):
            self._say(f"{self.monitor} improved from {self.best} to {value:.5f}")
            self.best = value
            return True
        self._say(f"{self.monitor} did not improve from {self.best}")
        return False

    def _known_direction(self) -> Direction:
        """Also looks up the best there is, once."""
        if self._direction is None:
            self._direction = direction_of(self.monitor, self.mode, self.model)
            found = best_of(list_run(str(self._run_directory)), self.monitor, self._direction)
            if found is not None and is_better(found, self.best, self._direction):
                self.best = found
        return self._direction

    def _best_kept(self) -> Sequence[tuple[str, str, int]]:
        if self._keep_best == 0:
            return ()
        return ((self.monitor, self._known_direction(), self._keep_best),)

    def _format(self, batch: int | None, logs: Mapping[str, Any]) -> str:
        words = {**logs, "epoch": self._epoch + 1}
        if batch is not None:
            words["batch"] = batch + 1
        try:
            return self._name.format(**words)
        except KeyError as error:
            raise KeyError(
                f'filepath "{self.filepath}" names {error}, which is not in the logs'
            ) from None

    def _name_durable(self) -> None:
        waiting = []
        for name, ticket in self._pending:
            if ticket.state == "durable":
                checkpoint = f"{ticket.sequence:08d}-step-{ticket.step}"
                self._links.point(name, self._run_directory / checkpoint)
            elif not ticket.is_final:
                waiting.append((name, ticket))
        self._pending = waiting

    def _say(self, text: str) -> None:
        if self.verbose > 0:
            print(f"\nEpoch {self._epoch + 1}: {text}")


def _step_of(model: Any) -> int:
    """Training steps so far, as the optimizer counts them."""
    return int(model.optimizer.iterations.numpy())


def _numbers(logs: Mapping[str, Any]) -> dict[str, float]:
    """Those of the logs that a manifest can hold."""
    return {name: float(value) for name, value in logs.items() if np.ndim(value) == 0}
