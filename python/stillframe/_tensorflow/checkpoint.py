"""stillframe.tensorflow.Checkpoint: tf.train.Checkpoint's shape, through the daemon."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import tensorflow as tf

from stillframe._core.address import open_address, split_address
from stillframe._core.arguments import check_choice
from stillframe._core.saver import SaverOptions
from stillframe._core.session import list_run
from stillframe._core.ticket import Ticket
from stillframe._keras.held_values import Capture
from stillframe._tensorflow.restore import AllRestored, restore_into, write_tensorflow
from stillframe._tensorflow.run import Retention, TensorFlowRun
from stillframe.errors import InvalidArgument


class SavePath(str):
    """The path of a checkpoint that is on its way: the directory it will be once it is durable.

    Empty if the save failed to begin; the ticket has the reason.

    Attributes:
        ticket: the save's; `path.ticket.wait()` returns when the path can be relied on.
    """

    ticket: Ticket

    def __new__(cls, directory: str, ticket: Ticket) -> SavePath:
        """Name the checkpoint that `ticket` makes in `directory`."""
        sequence = ticket.sequence
        name = "" if sequence is None else f"{directory}/{sequence:08d}-step-{ticket.step}"
        self = super().__new__(cls, name)
        self.ticket = ticket
        return self


class Checkpoint:
    """Groups trackable objects, saves their variables and restores them: tf.train.Checkpoint.

    Takes what that takes: tf.Module, tf.Variable, optimizers, Keras models and layers, lists and
    dicts of them. Saves are asynchronous: training goes on while the daemon writes. Variables of
    strings, tables and iterators are refused by name.

    Args:
        root: an object whose attributes are saved as if they were given by name.
        capture: "eager" copies before save() returns; "lazy" holds the values meanwhile, which
            later assignments do not change. Values on GPUs are held with either.
        on_error: "warn" of failed saves, or "raise" at the next save. wait() always raises.
        **trackables: what to save, by name; attributes of this object from then on.
    """

    def __init__(
        self,
        root: Any = None,
        *,
        capture: Capture = "eager",
        on_error: Literal["warn", "raise"] = "warn",
        **trackables: Any,
    ) -> None:
        check_choice("capture", capture, ("eager", "lazy"))
        check_choice("on_error", on_error, ("warn", "raise"))
        self._capture = capture
        self._how = SaverOptions(on_error=on_error)
        self._root = tf.train.Checkpoint(root=root, **trackables)
        self._runs: dict[str, TensorFlowRun] = {}

    def __getattr__(self, name: str) -> Any:
        """A trackable object that was given by name."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._root, name)

    @property
    def save_counter(self) -> tf.Variable:
        """How many saves there were, of the restored history too; saved with the rest."""
        return self._root.save_counter

    def save(self, file_prefix: str, *, metrics: Mapping[str, Any] | None = None) -> SavePath:
        """Save the variables of now; returns while the daemon writes.

        Args:
            file_prefix: its directory is the run, as in "runs/digits/ckpt"; all checkpoints stay.
                Of a run that should keep a few use a CheckpointManager.
            metrics: numbers by name, stored with the checkpoint.

        Returns:
            The path that the checkpoint will have, with its ticket.

        Raises:
            InvalidArgument: something below cannot be saved, or the directory cannot be used.
            Unavailable: there is no daemon.
        """
        directory = os.path.dirname(os.path.abspath(os.fspath(file_prefix)))
        run = self._runs.get(directory)
        if run is None:
            run = self._open_run(directory, Retention())
        return self._save(run, None, metrics)

    def restore(self, save_path: str | os.PathLike[str] | None) -> Any:
        """Give the variables their values from a checkpoint.

        Of a run that this object saves to, it waits for the saves under way. Variables that do not
        exist yet (a layer that was not called, an optimizer before its first
        step) get theirs when they are made, as TensorFlow does it.

        Args:
            save_path: what save() returned; a run, for its newest; RUN@best, RUN@12, RUN@v1.0; or a
                checkpoint of tf.train.Checkpoint, by its prefix. None does nothing.

        Returns:
            A status with assert_consumed(), assert_existing_objects_matched(),
            assert_nontrivial_match() and expect_partial(), as from tf.train.Checkpoint.

        Raises:
            InvalidArgument: it holds no variables of TensorFlow, or shapes or dtypes differ: all
                are listed, nothing was assigned.
            NotFound: there is none.
            DataLoss: it is damaged.
        """
        if save_path is None:
            return AllRestored()
        name = os.fspath(save_path)
        if os.path.exists(f"{name}.index"):
            return self._root.restore(name)
        _ = self.save_counter  # TensorFlow makes it at the first save, and misses it else.
        directory, selector = split_address(name)
        run = self._runs.get(os.path.abspath(directory))
        if run is not None:
            run.settle()
        with run.open(selector) if run is not None else open_address(name) as saved:
            return restore_into(self._root, saved, name)

    def close(self, timeout: float | None = None) -> None:
        """Wait until the last saves are durable, then let the daemon go. Twice is harmless.

        Raises:
            TimeoutError: they are not, in `timeout` seconds.
            StillframeError: one has failed.
        """
        for run in self._runs.values():
            run.saver.close(timeout)
        self._runs.clear()

    def _open_run(self, directory: str, retention: Retention) -> TensorFlowRun:
        if directory in self._runs:
            raise InvalidArgument(f"this Checkpoint saves to {directory} already; close() it first")
        run = TensorFlowRun(directory, self._root, retention, self._how, self._capture)
        self._runs[directory] = run
        return run

    def _save(
        self, run: TensorFlowRun, number: int | None, metrics: Mapping[str, Any] | None
    ) -> SavePath:
        count = int(self.save_counter.assign_add(1))
        return SavePath(run.directory, run.save(count if number is None else number, metrics))


def latest_checkpoint(checkpoint_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a run that is durable and intact, or None; needs no daemon."""
    directory = os.path.abspath(os.fspath(checkpoint_dir))
    intact = [one for one in list_run(directory) if one["damage"] is None]
    return os.path.join(directory, os.path.basename(str(intact[-1]["path"]))) if intact else None


def write_tf_checkpoint(path: str | os.PathLike[str], file_prefix: str) -> None:
    """Write a checkpoint in TensorFlow's own format, for tf.train.Checkpoint.restore().

    Args:
        path: as for Checkpoint.restore().
        file_prefix: of the files to write, as in "out/ckpt-1".

    Raises:
        InvalidArgument: it was not saved by stillframe.tensorflow.
        NotFound: there is none.
        DataLoss: it is damaged.
    """
    with open_address(path) as saved:
        write_tensorflow(saved, os.fspath(path), os.fspath(file_prefix))
