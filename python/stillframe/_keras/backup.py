"""stillframe.keras.BackupAndRestore: a fit() that can be killed at any instant and goes on.

A save is made when every callback has seen the batch or the epoch: at the beginning of what comes
next. The restore happens in the first on_epoch_begin(), after every on_train_begin() has set its
callback to zero.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import time
from collections.abc import Sequence
from typing import Any, Literal

import keras

from stillframe._core.arguments import check_choice
from stillframe._core.saver import SaverOptions
from stillframe._core.session import AttachOptions
from stillframe._core.warn import warn
from stillframe._keras.callback_state import check_states, get_states, set_states
from stillframe._keras.data import DataPosition, running_iterator, sample_batch, unreproducible
from stillframe._keras.held_values import Capture
from stillframe._keras.rng import get_rng, set_rng
from stillframe._keras.run import KerasRestored, KerasRun
from stillframe.errors import InvalidArgument, StillframeError

_SECTIONS = ("model", "optimizer", "metrics")


class BackupAndRestore(keras.callbacks.Callback):  # type: ignore[misc]
    """Lets a fit() that was killed go on where it was, in the middle of an epoch too.

    Saves weights, optimizer, metrics, random number generators, epoch and batch, and the states of
    the callbacks that are named. A fit() with the same arguments then continues: finished epochs
    are not trained again, of the running one only the batches that are left are, and every other
    callback sees each batch once. On the CPU the result is the one of an uninterrupted fit(), bit
    for bit.

    The order of the data is found again by making and dropping iterators for the finished epochs
    and reading the batches that were done. Where the order cannot be the same again (a shuffle
    without seed, a Python generator) the epoch is begun anew, and a warning says so.

    Args:
        directory: the run, of its own for this callback.
        save_freq: "epoch", or a number of batches.
        callbacks: whose states belong to the training, such as EarlyStopping.
        delete_checkpoint: remove the checkpoints once fit() has ended by itself.
        keep_last: how many of the newest checkpoints stay.
        capture: "eager" copies before training goes on; "lazy" holds the values meanwhile. Values
            on GPUs are held with either, on TensorFlow.
        on_error: "warn" of failed saves; "raise" raises them at the next save and at the end.

    Raises:
        InvalidArgument: an argument is wrong.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        save_freq: Literal["epoch"] | int = "epoch",
        callbacks: Sequence[Any] = (),
        delete_checkpoint: bool = False,
        *,
        keep_last: int = 2,
        capture: Capture = "eager",
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        super().__init__()
        check_choice("on_error", on_error, ("warn", "raise"))
        if save_freq != "epoch" and (not isinstance(save_freq, int) or save_freq < 1):
            raise InvalidArgument(f'save_freq is {save_freq!r}, not "epoch" or a number of batches')
        if keep_last < 1:
            raise InvalidArgument(f"keep_last is {keep_last}; it must be 1 or more")
        self.save_freq = save_freq
        self.delete_checkpoint = delete_checkpoint
        self._callbacks = list(callbacks)
        self._options = AttachOptions(
            directory=os.path.abspath(os.fspath(directory)),
            keep_last=keep_last,
            framework=f"keras {keras.__version__}",
            python_version=platform.python_version(),
        )
        self._how = SaverOptions(on_error=on_error)
        self._capture = capture
        self._run: KerasRun | None = None
        self._position: DataPosition | None = None
        self._iterator: Any = None
        self._found: KerasRestored | None = None
        self._epoch = 0
        self._epoch_rng: dict[str, Any] = {}
        self._is_due = False
        self._is_prepared = False
        self._batches = 0

    # --- What Keras calls -------------------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        """Attach, and see at which epoch to begin.

        Raises:
            InvalidArgument: the model is not built, or the directory cannot be used.
            DataLoss: there are checkpoints, but none is intact.
        """
        if not self.model.built:
            raise InvalidArgument(
                "the model is not built, so there is nothing to restore into; call build(), or the "
                "model on one batch, before fit()"
            )
        self._iterator = running_iterator()
        self._position = DataPosition(self._iterator)
        self._run = KerasRun(self._options, self._how, capture=self._capture, sections=_SECTIONS)
        self._is_due = False
        self._is_prepared = False
        self._batches = 0
        self._found = self._run.find()
        if self._found is None:
            return
        extra = self._found.extra
        check_states(self._callbacks, extra["callbacks"])
        # fit() takes the first epoch from here. It would stay for the next fit() too, and is taken
        # back as soon as it was read.
        self.model._initial_epoch = self.params["epochs"] if extra["stopped"] else extra["epoch"]
        if self.model._initial_epoch >= self.params["epochs"]:
            self._restore()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Restore in the first epoch; save what the epoch before has left."""
        self.model._initial_epoch = 0
        if self._found is not None:
            self._restore()
        else:
            self._epoch_rng = get_rng()
        self._epoch = epoch
        if self._is_due:
            self._save_if_due()
        elif self._run is not None and not self._is_prepared:
            self._run.prepare(self.model, self._extra())
        self._is_prepared = True

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Save what is due, now that every callback has seen the batch before."""
        self._save_if_due()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Count."""
        assert self._position is not None
        done = batch + 1
        self._batches += done - self._position.batches_done
        self._position.batches_done = done
        if self.save_freq != "epoch" and self._batches >= self.save_freq:
            self._is_due = True
            self._batches = 0

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Count."""
        assert self._position is not None
        self._position.end_epoch()
        self._epoch = epoch + 1
        # The state at an epoch's end is what the epoch's last batches would be due for.
        self._is_due = self._is_due or self.save_freq == "epoch"

    def on_train_end(self, logs: Any = None) -> None:
        """Save the end, so that a fit() after it has nothing to do; wait until it is durable.

        Raises:
            StillframeError: with on_error="raise": the last save has failed.
        """
        self.model._initial_epoch = 0
        run, self._run, self._iterator = self._run, None, None
        if run is None:
            return
        try:
            if self._found is None:
                self._epoch_rng = get_rng()
                self._save(run)
            run.saver.close()
        except StillframeError:
            # It was warned of.
            if self._how.on_error == "raise":
                raise
        else:
            if self.delete_checkpoint:
                _remove_run(self._options.directory)

    # --- Saving and restoring ---------------------------------------------------------------------

    def _save_if_due(self) -> None:
        if self._is_due and self._run is not None:
            self._is_due = False
            self._save(self._run)

    def _save(self, run: KerasRun) -> None:
        run.save(self.model, int(self.model.optimizer.iterations.numpy()), extra=self._extra())

    def _extra(self) -> dict[str, Any]:
        assert self._position is not None
        return {
            "epoch": self._epoch,
            "batch": self._position.batches_done,
            "batches_per_epoch": self._position.batches_per_epoch,
            "stopped": bool(self.model.stop_training),
            "rng": get_rng(),
            "epoch_rng": self._epoch_rng,
            "callbacks": get_states(self._callbacks),
        }

    def _restore(self) -> None:
        assert self._run is not None
        assert self._position is not None
        assert self._found is not None
        found, self._found = self._found, None
        self._build()
        self._run.restore(self.model, str(found.sequence))
        extra = found.extra
        set_states(self._callbacks, extra["callbacks"])
        reason = unreproducible(self._iterator)
        if reason is None:
            self._position.pass_epochs(extra["epoch"], extra["batches_per_epoch"])
            self._position.skip(extra["batch"], extra["rng"])
            self._epoch_rng = extra["epoch_rng"]
            set_rng(self._epoch_rng)
            return
        if extra["batch"] > 0:
            warn(
                f"epoch {extra['epoch'] + 1} is begun anew after {extra['batch']} of its batches: "
                f"{reason}"
            )
        set_rng(extra["rng"])

    def _build(self) -> None:
        """Make the variables that Keras makes in the first batch."""
        batch = sample_batch(self._iterator)
        if batch is not None:
            self.model._symbolic_build(data_batch=batch)
        elif not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)


def _remove_run(directory: str) -> None:
    """Remove a run that the daemon may still be tidying up: from its place at once, then whole."""
    moved = f"{directory}.removed-{os.getpid()}"
    with contextlib.suppress(OSError):
        os.rename(directory, moved)
        for _ in range(50):
            shutil.rmtree(moved, ignore_errors=True)
            if not os.path.lexists(moved):
                return
            time.sleep(0.1)  # A name was made beside us.
