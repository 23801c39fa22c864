"""Restoring into the variables below a tf.train.Checkpoint.

Where every variable exists and has its counterpart, the values are assigned at once. Where objects
will make their variables later (layers that are not called yet, optimizers before their first
step), TensorFlow itself restores: the checkpoint is written to a temporary file of its format,
which serves until this process ends.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from stillframe._core.layout import TensorSpec
from stillframe._core.saved import Place, SavedCheckpoint
from stillframe._core.state_json import decode
from stillframe._keras.values import assign, new_buffer, tensor_of
from stillframe._tensorflow.graph import PART, GraphVariable, VariableGraph, keys_by_name
from stillframe.errors import DataLoss, InvalidArgument

_GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"


class AllRestored:
    """The status of a restore in which every variable and every value found its counterpart.

    It has the methods of TensorFlow's statuses; there is nothing left for them to find.
    """

    def assert_consumed(self) -> AllRestored:
        """Nothing to find."""
        return self

    def assert_existing_objects_matched(self) -> AllRestored:
        """Nothing to find."""
        return self

    def assert_nontrivial_match(self) -> AllRestored:
        """Nothing to find."""
        return self

    def expect_partial(self) -> AllRestored:
        """Nothing to be silent about."""
        return self


def restore_into(root: Any, saved: SavedCheckpoint, name: str) -> Any:
    """Give the variables below `root` their values from `saved`.

    Returns:
        A status with assert_consumed(), assert_existing_objects_matched(),
        assert_nontrivial_match() and expect_partial(), as tf.train.Checkpoint.restore() gives.

    Raises:
        InvalidArgument: it was not saved from TensorFlow variables, or shapes or dtypes differ: all
            are listed, nothing was assigned.
        DataLoss: it is damaged.
    """
    description = _description(saved, name)
    graph = VariableGraph(root)
    own = graph.by_name()
    there = {spec.name: spec for part in saved.parts for spec in part.tensors}
    _check_shapes(own, there, name)
    values = _read(saved, there)
    if own.keys() == there.keys():
        for key, variable in own.items():
            assign(variable.holder, variable.spec, values[key])
        graph.finish_layers()
        return AllRestored()
    tensors = {key: tensor_of(spec, values[key]) for key, spec in there.items()}
    directory = tempfile.mkdtemp(prefix="stillframe-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    prefix = os.path.join(directory, "ckpt")
    _write(prefix, tensors, description, name)
    status = root.read(prefix)
    graph.finish_layers()
    return status


def write_tensorflow(saved: SavedCheckpoint, name: str, prefix: str) -> None:
    """Write a checkpoint as tf.train.Checkpoint does, which can read it; see restore_into()."""
    description = _description(saved, name)
    there = {spec.name: spec for part in saved.parts for spec in part.tensors}
    values = _read(saved, there)
    tensors = {key: tensor_of(there[key], value) for key, value in values.items()}
    _write(prefix, tensors, description, name)


def _description(saved: SavedCheckpoint, name: str) -> bytes:
    own = saved.state.get("tensorflow")
    if own is None:
        framework = saved.manifest.get("framework") or "another framework"
        raise InvalidArgument(
            f"{name} comes from {framework} and holds no tf.train.Checkpoint; its tensors open "
            "with the safetensors library, a Keras model with stillframe.keras.load_model()"
        )
    try:
        description = decode(own["object_graph"], "tensorflow.object_graph", tensor=_no_tensor)
    except (KeyError, TypeError) as error:
        raise DataLoss(f"{name}: state.json has no object graph") from error
    if not isinstance(description, bytes):
        raise DataLoss(f"{name}: state.json has no object graph")
    return description


def _no_tensor(name: str) -> Any:
    raise DataLoss(f"state.json: {name} stands where no tensor belongs")


def _check_shapes(
    own: Mapping[str, GraphVariable], there: Mapping[str, TensorSpec], name: str
) -> None:
    lines = [
        f"  {key} is {variable.spec.dtype} {list(variable.spec.shape)}, in the checkpoint "
        f"{there[key].dtype} {list(there[key].shape)}"
        for key, variable in own.items()
        if key in there
        and (there[key].shape, there[key].dtype) != (variable.spec.shape, variable.spec.dtype)
    ]
    if lines:
        listed = "\n".join(lines)
        raise InvalidArgument(
            f"{name} does not fit, and nothing was assigned; {len(lines)} differences:\n{listed}"
        )


def _read(saved: SavedCheckpoint, there: Mapping[str, TensorSpec]) -> dict[str, Any]:
    buffers = {key: new_buffer(spec) for key, spec in there.items()}
    tensors = saved.tensors.get(PART, {})
    saved.read([Place(one, buffers[key].ctypes.data, None) for key, one in tensors.items()])
    return buffers


def _write(prefix: str, tensors: Mapping[str, Any], description: bytes, name: str) -> None:
    try:
        keys = keys_by_name(description)
        names = [*(keys[key] for key in tensors), _GRAPH_KEY]
    except (KeyError, ValueError) as error:
        raise DataLoss(f"{name}: state.json has no graph of these variables") from error
    with tf.device("CPU:0"):
        values = [*tensors.values(), tf.constant(description)]
        tf.raw_ops.SaveV2(
            prefix=prefix, tensor_names=names, shape_and_slices=[""] * len(names), tensors=values
        )
