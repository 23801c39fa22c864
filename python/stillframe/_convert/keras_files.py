"""Files of Keras: `.keras` and `.weights.h5`, written from a checkpoint and read where they lie.

Keras's weight files are keyed by the same walk over the model as our tensors: "layers/dense/vars/0"
there is "layers/dense/0" here. So neither way needs the model itself, nor its memory.
"""

from __future__ import annotations

import datetime
import json
import math
import mmap
import os
import platform
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import h5py
import keras
import numpy as np
import numpy.typing as npt
from keras.src.saving import saving_lib

from stillframe._convert.zip_files import FileSlice, check_zip
from stillframe._core.layout import DTYPES, TensorSpec
from stillframe._core.saved import Place, SavedCheckpoint
from stillframe._core.state_json import dumps
from stillframe._keras.assets import PART as ASSETS_PART
from stillframe._keras.state import FORMAT
from stillframe._keras.values import as_array, spec_of
from stillframe.errors import DataLoss, InvalidArgument, NotFound

_ARCHIVE = ".keras"
_WEIGHTS = ".weights.h5"
_CONFIG_MEMBER = "config.json"
_METADATA_MEMBER = "metadata.json"
_WEIGHTS_MEMBER = "model.weights.h5"
# A larger tensor passes through a nameless file, not through memory.
_MEMORY_BYTES = 64 * 2**20


def write(
    run: str, sequence: int, target: str, *, only_model: bool, progress: Callable[[int], None]
) -> tuple[list[str], list[str]]:
    """Write a checkpoint as Keras does, durably.

    Args:
        run: directory of the run.
        sequence: which checkpoint.
        target: the temporary name; without ".partial" it ends in .keras or .weights.h5.
        only_model: leave the optimizer's state out.
        progress: called with the bytes of each tensor.

    Returns:
        The file's name, and notes for people.

    Raises:
        InvalidArgument: the checkpoint is not one of Keras, or the name has another ending.
        DataLoss: it is damaged.
    """
    name = Path(target).name.removesuffix(".partial")
    if not name.endswith((_ARCHIVE, _WEIGHTS)):
        raise InvalidArgument(f"{name}: must end in {_ARCHIVE}, or in {_WEIGHTS} for weights alone")
    with SavedCheckpoint(run, str(sequence)) as saved:
        if "keras" not in saved.state:
            framework = saved.manifest.get("framework") or "another framework"
            raise InvalidArgument(
                f"checkpoint {sequence} of {run} comes from {framework}, not from Keras; choose "
                "safetensors, hf, torch or dcp"
            )
        notes: list[str] = []
        if name.endswith(_WEIGHTS):
            _write_weights(saved, target, only_model, progress, notes)
        else:
            _write_archive(saved, target, only_model, progress, notes)
    descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return [name], notes


def _write_archive(
    saved: SavedCheckpoint,
    target: str,
    only_model: bool,
    progress: Callable[[int], None],
    notes: list[str],
) -> None:
    recipe = _recipe(saved)
    metadata = {
        "keras_version": recipe["keras_version"],
        "date_saved": datetime.datetime.now().strftime("%Y-%m-%d@%H:%M:%S"),
    }
    with tempfile.TemporaryDirectory(dir=os.path.dirname(target) or ".") as directory:
        weights = os.path.join(directory, _WEIGHTS_MEMBER)
        _write_weights(saved, weights, only_model, progress, notes)
        with zipfile.ZipFile(target, "x") as archive:
            archive.writestr(_METADATA_MEMBER, json.dumps(metadata))
            archive.writestr(_CONFIG_MEMBER, recipe["config"])
            archive.write(weights, _WEIGHTS_MEMBER)
            _write_assets(saved, archive, progress)


def _write_assets(
    saved: SavedCheckpoint, archive: zipfile.ZipFile, progress: Callable[[int], None]
) -> None:
    for part in saved.parts:
        for spec in part.tensors if part.name == ASSETS_PART else ():
            buffer = np.empty(spec.shape, np.uint8)
            saved.read([Place(saved.tensors[part.name][spec.name], buffer.ctypes.data, None)])
            archive.writestr(spec.name, buffer.tobytes())
            progress(buffer.nbytes)


def _recipe(saved: SavedCheckpoint) -> dict[str, str]:
    recipe = saved.state["keras"].get("config")
    if not isinstance(recipe, dict) or not {"config", "keras_version"} <= recipe.keys():
        raise DataLoss("state.json has no configuration of the model")
    return recipe


def _write_weights(
    saved: SavedCheckpoint,
    path: str,
    only_model: bool,
    progress: Callable[[int], None],
    notes: list[str],
) -> None:
    store = saving_lib.H5IOStore(path, mode="w")
    left_out = []
    try:
        for part in saved.parts:
            groups: dict[str, list[tuple[str, TensorSpec]]] = {}
            for spec in part.tensors:
                place = _place(part.name, spec.name, only_model)
                if place is None:
                    left_out.append(spec.name)
                else:
                    groups.setdefault(place[0], []).append((place[1], spec))
            for group, members in groups.items():
                entries = store.make(group)
                for key, spec in members:
                    buffer = _buffer(DTYPES[spec.dtype][1] * math.prod(spec.shape), path)
                    tensor = saved.tensors[part.name][spec.name]
                    saved.read([Place(tensor, buffer.ctypes.data, None)])
                    entries[key] = as_array(spec, buffer)
                    progress(buffer.nbytes)
    finally:
        store.close()
    seeds = [name for name in left_out if name.startswith("rest.")]
    if seeds:
        notes.append(
            f"{len(seeds)} states of seed generators are left out: files of Keras do not hold them"
        )


def _place(part: str, name: str, only_model: bool) -> tuple[str, str] | None:
    """Group and key in Keras's file; None for what that does not hold."""
    if part == "model" and not name.startswith("rest."):
        group, _, key = name.rpartition("/")
        return group, key
    if part == "optimizer" and not only_model:
        return "optimizer", name.removeprefix("optimizer.")
    return None


def _buffer(size: int, beside: str) -> npt.NDArray[np.uint8]:
    if size <= _MEMORY_BYTES:
        return np.empty(size, np.uint8)
    with tempfile.TemporaryFile(dir=os.path.dirname(beside) or ".") as file:
        file.truncate(size)
        return np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8)


def plan(source: str, *, only_model: bool) -> dict[str, Any]:
    """What a stock file holds and where, as `stillframe import` takes it.

    Raises:
        NotFound: no such file.
        DataLoss: it is damaged.
        InvalidArgument: it is not a file of Keras 3 that can be read in place.
    """
    if not os.path.isfile(source):
        raise NotFound(f"{source}: no such file")
    if not source.endswith(_ARCHIVE):
        raise InvalidArgument(
            f"{source}: a .keras file is imported; weights alone do not say what model they are "
            "of: load them into it, and save with stillframe.keras.save_model()"
        )
    begins = check_zip(source, source)
    missing = {_CONFIG_MEMBER, _METADATA_MEMBER, _WEIGHTS_MEMBER} - begins.keys()
    if missing:
        raise InvalidArgument(f"{source} has no {', '.join(sorted(missing))}: it is no .keras file")
    with zipfile.ZipFile(source) as archive:
        config = archive.read(_CONFIG_MEMBER).decode()
        metadata = json.loads(archive.read(_METADATA_MEMBER))
        size = archive.getinfo(_WEIGHTS_MEMBER).file_size
        assets = [
            _asset_entry(info, begins[info.filename])
            for info in archive.infolist()
            if info.filename.startswith(f"{ASSETS_PART}/") and not info.is_dir()
        ]
    begin = begins[_WEIGHTS_MEMBER]
    with open(source, "rb") as file:
        parts = _read_weights(source, file, begin, size, only_model)
    parts[ASSETS_PART] = assets
    recipe = {
        "config": config,
        "keras_version": str(metadata.get("keras_version", "unknown")),
        "backend": keras.backend.backend(),
        "python_version": platform.python_version(),
    }
    state = {"format_version": 1, "keras": {"config": recipe, "labels": {}, "is_stock": True}}
    return {
        "parts": [
            {"name": part, "metadata": dict([FORMAT]), "tensors": tensors}
            for part, tensors in parts.items()
            if tensors
        ],
        "files": [os.path.abspath(source)],
        "state": f"{dumps(state)}\n",
        "step": None,
        "metrics": [],
        "framework": f"keras {recipe['keras_version']}",
        "python_version": platform.python_version(),
        "notes": [],
    }


def _asset_entry(info: zipfile.ZipInfo, begin: int) -> dict[str, Any]:
    segments = [[0, begin, info.file_size]] if info.file_size else []
    return {
        "name": info.filename,
        "dtype": "U8",
        "shape": [info.file_size],
        "segments": segments,
    }


def _read_weights(
    source: str, file: IO[bytes], begin: int, size: int, only_model: bool
) -> dict[str, list[dict[str, Any]]]:
    parts: dict[str, list[dict[str, Any]]] = {"model": [], "optimizer": []}
    try:
        with h5py.File(FileSlice(file, begin, size), "r") as weights:
            for path, dataset in _datasets(weights, ""):
                group, _, key = path.rpartition("/")
                if group != "vars" and not group.endswith("/vars"):
                    raise InvalidArgument(f"{source}: {path} is not where Keras 3 puts variables")
                group = group.removesuffix("vars").removesuffix("/")
                part, name = "model", f"{group}/{key}" if group else key
                if group == "optimizer":
                    part, name = "optimizer", f"optimizer.{key}"
                if part == "model" or not only_model:
                    parts[part].append(_entry(source, name, dataset, begin))
    except (OSError, KeyError, RuntimeError) as error:
        raise DataLoss(f"{source}: {_WEIGHTS_MEMBER} cannot be read: {error}") from error
    return parts


def _datasets(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name in group:
        # Neither links that lead elsewhere nor datasets that lie in other files.
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise InvalidArgument(f"{path}{name} is a link, which is not followed")
        one = group[name]
        if isinstance(one, h5py.Group):
            yield from _datasets(one, f"{path}{name}/")
        else:
            yield f"{path}{name}", one


def _entry(source: str, name: str, dataset: Any, begin: int) -> dict[str, Any]:
    if dataset.attrs.get("dtype") == "bfloat16":
        spec = TensorSpec(name, "BF16", tuple(map(int, dataset.shape)))
    elif dataset.dtype.byteorder == ">":
        raise InvalidArgument(f"{source}: {name} is big-endian")
    else:
        spec = spec_of(name, dataset)
    size = DTYPES[spec.dtype][1] * math.prod(spec.shape)
    offset = dataset.id.get_offset()
    if size and (offset is None or dataset.external or dataset.id.get_storage_size() != size):
        raise InvalidArgument(
            f"{source}: {name} is compressed or lies in pieces; load the file with keras, and save "
            "its model with stillframe.keras.save_model()"
        )
    segments = [[0, begin + offset, size]] if size else []
    return {"name": name, "dtype": spec.dtype, "shape": list(spec.shape), "segments": segments}
