"""stillframe.tensorflow.CheckpointManager: tf.train.CheckpointManager's shape."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stillframe._core.best import BestRule, parse_best
from stillframe._core.warn import warn
from stillframe._tensorflow.checkpoint import Checkpoint, SavePath
from stillframe._tensorflow.run import Retention
from stillframe.errors import DataLoss, InvalidArgument


class CheckpointManager:
    """Keeps a few checkpoints of a Checkpoint in a directory, which is the run.

    Args:
        checkpoint: what to save.
        directory: the run; made when absent. One manager at a time.
        max_to_keep: how many of the newest stay; None keeps all.
        keep_checkpoint_every_n_hours: not offered; None. Use `best`, or tags of the command line.
        checkpoint_name: taken for compatibility; checkpoints are named by sequence and step.
        step_counter: a variable that counts steps, for `checkpoint_interval`; then it is also the
            step of each checkpoint.
        checkpoint_interval: save() does nothing before so many steps have passed.
        init_fn: called by restore_or_initialize() when there is nothing to restore.
        best: `("val_loss", "min", 3)`, or a list of such: those stay besides.

    Raises:
        InvalidArgument: an argument is wrong.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        directory: str | os.PathLike[str],
        max_to_keep: int | None,
        keep_checkpoint_every_n_hours: float | None = None,
        checkpoint_name: str = "ckpt",
        step_counter: Any = None,
        checkpoint_interval: int | None = None,
        init_fn: Callable[[], Any] | None = None,
        *,
        best: BestRule | Sequence[BestRule] | None = None,
    ) -> None:
        if not isinstance(checkpoint, Checkpoint):
            raise InvalidArgument(
                f"checkpoint is a {type(checkpoint).__name__}, not a "
                "stillframe.tensorflow.Checkpoint"
            )
        if max_to_keep is not None and max_to_keep < 1:
            raise InvalidArgument(f"max_to_keep is {max_to_keep}; it must be 1 or more, or None")
        if keep_checkpoint_every_n_hours is not None:
            raise InvalidArgument(
                "keep_checkpoint_every_n_hours is not offered; use best=, or tag what shall stay: "
                "stillframe tag RUN@12 NAME"
            )
        if checkpoint_interval is not None and step_counter is None:
            raise InvalidArgument("checkpoint_interval needs a step_counter")
        self._checkpoint = checkpoint
        self._step_counter = step_counter
        self._interval = checkpoint_interval
        self._init_fn = init_fn
        self._checkpoint_name = checkpoint_name
        self._last_step: int | None = None
        criteria = parse_best(best)
        retention = Retention(
            keep_last=max_to_keep or 0,
            best=[(one.metric, one.mode, one.count) for one in criteria],
        )
        self._run = checkpoint._open_run(os.path.abspath(os.fspath(directory)), retention)

    @property
    def checkpoint(self) -> Checkpoint:
        """What it saves."""
        return self._checkpoint

    @property
    def directory(self) -> str:
        """The run."""
        return self._run.directory

    @property
    def checkpoint_interval(self) -> int | None:
        """As given."""
        return self._interval

    @property
    def checkpoints(self) -> list[str]:
        """The durable, intact checkpoints, oldest first; waits for the saves under way."""
        self._run.settle()
        return self._run.paths()

    @property
    def latest_checkpoint(self) -> str | None:
        """The newest of them, or None; waits for the saves under way."""
        paths = self.checkpoints
        return paths[-1] if paths else None

    def save(
        self,
        checkpoint_number: Any = None,
        check_interval: bool = True,
        *,
        metrics: Mapping[str, Any] | None = None,
    ) -> SavePath | None:
        """Save the variables of now; returns while the daemon writes.

        Args:
            checkpoint_number: the step of the checkpoint; None takes step_counter, or the number of
                saves.
            check_interval: False saves although checkpoint_interval has not passed.
            metrics: numbers by name, stored with the checkpoint; `best=` decides by them.

        Returns:
            The path that the checkpoint will have, with its ticket; None before the interval has
            passed.

        Raises:
            InvalidArgument: something cannot be saved, or the directory cannot be used.
            Unavailable: there is no daemon.
        """
        step = None if self._step_counter is None else int(self._step_counter)
        if step is not None and self._interval is not None:
            is_early = self._last_step is not None and step - self._last_step < self._interval
            if check_interval and is_early:
                return None
            self._last_step = step
        number = step if checkpoint_number is None else int(checkpoint_number)
        return self._checkpoint._save(self._run, number, metrics)

    def restore_or_initialize(self) -> str | None:
        """Restore the newest checkpoint; without one call `init_fn`.

        One that is damaged is warned of, and the one before is taken.

        Returns:
            The path of what was restored, or None.

        Raises:
            InvalidArgument: as Checkpoint.restore().
            DataLoss: there are checkpoints, but none is intact.
        """
        damages: list[str] = []
        for path in reversed(self.checkpoints):
            try:
                self._checkpoint.restore(path)
            except DataLoss as error:
                damages.append(f"{path}: {error}")
                continue
            if damages:
                warn(f"{'; '.join(damages)}; {path} was restored instead")
            if self._step_counter is not None:
                self._last_step = int(self._step_counter)
            return path
        damages += self._run.damages()
        if damages:
            raise DataLoss("; ".join(damages))
        if self._init_fn is not None:
            self._init_fn()
        return None

    def close(self, timeout: float | None = None) -> None:
        """Wait until the last save is durable, then let the daemon go. Twice is harmless.

        Raises:
            TimeoutError: it is not, in `timeout` seconds.
            StillframeError: it has failed.
        """
        self._run.saver.close(timeout)
        self._checkpoint._runs.pop(self._run.directory, None)
