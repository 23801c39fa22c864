"""TensorFlowRun: one run's saves of a tf.train.Checkpoint's variables, below the public classes."""

from __future__ import annotations

import base64
import dataclasses
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from stillframe._core.arguments import check_choice
from stillframe._core.saved import SavedCheckpoint
from stillframe._core.saver import Saver, SaverOptions
from stillframe._core.session import AttachOptions, list_run
from stillframe._core.state_json import dumps
from stillframe._core.ticket import Ticket
from stillframe._core.warn import warn
from stillframe._keras.held_values import Capture, HeldContent, save_held
from stillframe._keras.values import pin
from stillframe._tensorflow.graph import VariableGraph
from stillframe.errors import InvalidArgument

_SETTLE_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Retention:
    """What stays of a run.

    Attributes:
        keep_last: the newest; 0 is all.
        best: (metric, "min" or "max", how many), each kept besides.
    """

    keep_last: int = 0
    best: Sequence[tuple[str, str, int]] = ()


class TensorFlowRun:
    """Saves what is below `root` to a run. Attaches at the first use.

    Args:
        directory: the run.
        root: a tf.train.Checkpoint.
        retention: what stays.
        how: waiting and failing, as for the Checkpointer.
        capture: "eager" copies before save() returns; "lazy" holds the values, which later
            assignments do not change, and copies while training runs, as it is with those of GPUs.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        root: Any,
        retention: Retention,
        how: SaverOptions,
        capture: Capture,
    ) -> None:
        check_choice("capture", capture, ("eager", "lazy"))
        self.directory = os.path.abspath(os.fspath(directory))
        options = AttachOptions(
            directory=self.directory,
            keep_last=retention.keep_last,
            best=list(retention.best),
            framework=f"tensorflow {tf.__version__}",
            python_version=platform.python_version(),
        )
        self.saver = Saver(options, how)
        self._root = root
        self._capture = capture
        self._graph: VariableGraph | None = None

    def save(self, step: int, metrics: Mapping[str, Any] | None) -> Ticket:
        """Save the variables of now; see Checkpointer.save() for tickets and errors."""
        if not tf.executing_eagerly():
            raise InvalidArgument("save outside of tf.function: inside it runs only when traced")
        return save_held(
            self.saver, self._content, step=step, metrics=metrics, capture=self._capture
        )

    def _content(self) -> HeldContent:
        if self._graph is None or not self._graph.is_current():
            self._graph = VariableGraph(self._root)
        values = [pin(one.holder, one.spec) for one in self._graph.variables]
        return HeldContent(self._graph.parts, values, _state_json(self._graph))

    def settle(self) -> None:
        """Wait until no save of the run is under way, of an earlier process either."""
        if not self.saver.is_usable:
            return
        session = self.saver.attach()
        self.saver.finish_capture()
        if not session.settle(time.monotonic() + _SETTLE_SECONDS):
            warn(f"a save to {self.directory} is not durable after {_SETTLE_SECONDS:.0f} s")

    def open(self, selector: str) -> SavedCheckpoint:
        """A checkpoint of the run, from the daemon's memory where it still is there."""
        return SavedCheckpoint(self.directory, selector, self.saver.attach())

    def paths(self) -> list[str]:
        """The run's intact checkpoints, oldest first."""
        return [
            os.path.join(self.directory, Path(str(one["path"])).name)
            for one in list_run(self.directory)
            if one["damage"] is None
        ]

    def damages(self) -> list[str]:
        """What is wrong with those that are not."""
        return [
            f"{one['path']}: {one['damage']}"
            for one in list_run(self.directory)
            if one["damage"] is not None
        ]


def _state_json(graph: VariableGraph) -> bytes:
    described = {"$bytes": base64.b64encode(graph.description).decode("ascii")}
    own = {"version": tf.__version__, "object_graph": described}
    return f'{{"format_version": 1, "tensorflow": {dumps(own)}}}\n'.encode()
