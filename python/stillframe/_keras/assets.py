"""What layers keep in files, beside their variables: the vocabularies of lookup layers, above all.

A checkpoint holds each file as a tensor of bytes, in a part of its own; its name is the file's path
in a `.keras` archive.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from keras.src.saving import saving_lib

from stillframe._core.saved import SavedCheckpoint
from stillframe._keras.read import read_values
from stillframe.errors import DataLoss, InvalidArgument

PART = "assets"


def write_assets(model: Any) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
    """The files that the model's layers would write, by name, in the order of the names.

    Raises:
        InvalidArgument: a layer's files are not all that its state is; it is named.
    """
    layers = [layer for layer in model._flatten_layers() if hasattr(layer, "save_assets")]
    if not layers:
        return
    store = saving_lib.DiskIOStore(PART, mode="w")
    try:
        saving_lib._save_state(model, None, store, "", _no_layers(model))
        folder = Path(store.working_dir)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if files:
            _check_weights(layers)
        for path in files:
            yield f"{PART}/{path.relative_to(folder).as_posix()}", np.fromfile(path, np.uint8)
    finally:
        store.close()


def read_assets(model: Any, saved: SavedCheckpoint) -> None:
    """Let the model's layers take the files that the checkpoint holds, each checked.

    Raises:
        DataLoss: a name is not one of a file below a folder.
    """
    buffers = read_values(saved, (PART,))
    if not buffers:
        return
    with tempfile.TemporaryDirectory() as directory:
        for name, buffer in buffers.items():
            path = PurePosixPath(name)
            if path.parts[:1] != (PART,) or ".." in path.parts:
                raise DataLoss(f"{name} is no name of an asset")
            target = Path(directory, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            buffer.tofile(target)
        store = saving_lib.DiskIOStore(os.path.join(directory, PART), mode="r")
        saving_lib._load_state(model, None, store, "", visited_saveables=_no_layers(model))


def _no_layers(model: Any) -> set[int]:
    """What Keras's walk over a model is to leave out."""
    return {id(one) for one in (getattr(model, "optimizer", None), *model.metrics) if one}


def _check_weights(layers: Sequence[Any]) -> None:
    for layer in layers:
        lookup = getattr(layer, "_lookup_layer", layer)
        if getattr(lookup, "output_mode", None) != "tf_idf":
            continue
        # Keras makes the place for its weights only when they are known.
        if getattr(lookup, "input_vocabulary", None) is None:
            raise InvalidArgument(
                f"layer {layer.name!r} has adapted tf_idf weights, which a new layer has no place "
                "for; make it with vocabulary= and idf_weights="
            )
