"""The variables below a tf.train.Checkpoint, named by the attributes that lead to them.

TensorFlow walks the objects breadth first and names each variable by the shortest way:
"model/layer1/kernel". So do we, except that an optimizer's list of the variables that it trains
is no way to a model's. TensorFlow's description of the graph is kept too: from it TensorFlow itself
can restore objects that make their variables later.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph
from tensorflow.python.checkpoint import graph_view, save_util

from stillframe._core.layout import PartSpec, TensorSpec
from stillframe._keras.values import spec_of
from stillframe.errors import InvalidArgument

PART = "model"
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
# Of Keras's optimizers: other objects' variables.
_DETOUR = "_trainable_variables"
FORMAT: tuple[str, str] = ("format", "tf")


@dataclasses.dataclass(frozen=True, slots=True)
class GraphVariable:
    """One variable: a tf.Variable, or a Keras variable that holds one."""

    spec: TensorSpec
    holder: Any


class VariableGraph:
    """All variables below `root` now.

    Args:
        root: a tf.train.Checkpoint.

    Attributes:
        variables: in the order of the file.
        parts: the layout of `variables`.
        description: TensorFlow's, a serialised TrackableObjectGraph.

    Raises:
        InvalidArgument: something below `root` cannot be saved: all that is, is named.
    """

    def __init__(self, root: Any) -> None:
        self._view = graph_view.ObjectGraphView(root)
        self._nodes, _ = self._view.breadth_first_traversal()
        _, _, _, proto = save_util.serialize_graph_view(self._view)
        paths = _paths(proto)
        found: list[GraphVariable] = []
        refused: list[str] = []
        for index, (node, described) in enumerate(zip(self._nodes, proto.nodes, strict=True)):
            for attribute in described.attributes:
                if not attribute.checkpoint_key.endswith(_VALUE):
                    refused.append(f"{paths[index]} is a {_kind(node)}")
                    continue
                try:
                    found.append(GraphVariable(spec_of(paths[index], _shaped(node)), node))
                except InvalidArgument as error:
                    refused.append(str(error))
        if refused:
            raise InvalidArgument(
                "only variables of numbers have a form in a checkpoint; leave these out, and save "
                f"what they are made from: {'; '.join(refused)}"
            )
        self.variables = sorted(found, key=lambda one: one.spec.file_order)
        self.parts = [PartSpec(PART, tuple(one.spec for one in self.variables), (FORMAT,))]
        self.description: bytes = proto.SerializeToString(deterministic=True)

    def is_current(self) -> bool:
        """Whether walking again finds the same objects with the same shapes."""
        nodes, _ = self._view.breadth_first_traversal()
        return (
            len(nodes) == len(self._nodes)
            and all(now is before for now, before in zip(nodes, self._nodes, strict=True))
            and all(tuple(_shaped(one.holder).shape) == one.spec.shape for one in self.variables)
        )

    def finish_layers(self) -> None:
        """Let layers whose variables were assigned work out what follows from them.

        Normalization keeps a mean and a variance that it has computed from its variables. A
        restore of tf.train.Checkpoint leaves the old ones.
        """
        for node in self._nodes:
            if isinstance(node, keras.layers.Layer) and node.built and node.variables:
                finalize = getattr(node, "finalize_state", None)
                if finalize is not None:
                    finalize()

    def by_name(self) -> dict[str, GraphVariable]:
        """The variables by name."""
        return {one.spec.name: one for one in self.variables}


def keys_by_name(description: bytes) -> dict[str, str]:
    """TensorFlow's keys of the variables in a VariableGraph's description, by our names.

    Raises:
        ValueError: it is no description.
    """
    proto = TrackableObjectGraph()
    try:
        proto.ParseFromString(description)
        paths = _paths(proto)
    except Exception as error:  # DecodeError, or an index that is none.
        raise ValueError("not an object graph") from error
    return {
        paths[index]: attribute.checkpoint_key
        for index, node in enumerate(proto.nodes)
        for attribute in node.attributes
    }


def _paths(proto: Any) -> dict[int, str]:
    """The way to each node, by its number."""
    paths: dict[int, str] = {0: ""} if proto.nodes else {}
    for takes_detours in (False, True):
        at = list(paths)
        for index in at:  # Grows on the way.
            for child in proto.nodes[index].children:
                is_known = child.node_id in paths
                if is_known or (child.local_name == _DETOUR and not takes_detours):
                    continue
                name = child.local_name.replace(".", "..").replace("/", ".S")
                paths[child.node_id] = f"{paths[index]}/{name}" if paths[index] else name
                at.append(child.node_id)
    return paths


def _shaped(variable: Any) -> Any:
    """The variable, or its value where only that has a shape."""
    rank = variable.shape.rank if hasattr(variable.shape, "rank") else len(variable.shape)
    if rank is None or any(size is None for size in variable.shape):
        return variable.read_value()
    return variable


def _kind(node: Any) -> str:
    return f"{type(node).__module__.partition('.')[0]} {type(node).__name__}"
