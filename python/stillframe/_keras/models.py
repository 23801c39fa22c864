"""stillframe.keras.save_model(), load_model() and load_weights(): whole Keras models."""

from __future__ import annotations

import os
import zipfile
from typing import Any

import keras
from keras.src.saving import saving_lib

from stillframe._core.address import open_address
from stillframe._core.saved import SavedCheckpoint
from stillframe._core.state_json import dumps
from stillframe._core.write_parts import write_parts
from stillframe._keras.assets import read_assets
from stillframe._keras.fill import fill
from stillframe._keras.held_values import HeldValues
from stillframe._keras.read import BackgroundReader
from stillframe._keras.run import config_text
from stillframe._keras.skip_init import SkipInitialisation
from stillframe._keras.state import KerasState
from stillframe._keras.values import pin
from stillframe.errors import DataLoss, InvalidArgument, NotFound


def save_model(model: Any, path: str | os.PathLike[str], *, include_optimizer: bool = True) -> None:
    """Save a whole model: its configuration, weights and optimizer; needs no daemon.

    The result is a directory: model.safetensors, which every safetensors reader opens, a manifest
    with hashes of every byte, and Keras's own configuration of the model; vocabularies that layers
    have learned by adapt() are in it as well. It is complete whatever
    happens, and durable when this returns. One that is there already is replaced at once.

    Args:
        model: a built model, compiled or not.
        path: the directory to make.
        include_optimizer: with the optimizer's state, to train on.

    Raises:
        InvalidArgument: the model is not built, a variable cannot be saved, or something else is
            at `path`.
        ResourceExhausted: the disk is full; what was there is as it was.
        Unavailable: the drive failed, or libstillframe.so is missing.
    """
    sections = ("model", "assets", "optimizer") if include_optimizer else ("model", "assets")
    state = KerasState(model, sections)
    text = (
        f'{{"format_version": 1, "keras": {{"config": {config_text(model)}, '
        f'"labels": {dumps(state.labels)}}}}}\n'
    )
    values = [
        pin(one.value if one.holder is None else one.holder, one.spec, on_host=True)
        for one in state.tensors
    ]
    write_parts(
        os.fspath(path),
        state.parts,
        HeldValues.of(values, "eager").sources,
        text.encode(),
        framework=f"keras {keras.__version__}",
    )


def load_model(
    path: str | os.PathLike[str],
    custom_objects: dict[str, Any] | None = None,
    compile: bool = True,
    safe_mode: bool = True,
) -> Any:
    """Make a model again, every byte of its weights checked; needs no daemon.

    Args:
        path: a directory of save_model(); a name that ModelCheckpoint made; a run's checkpoint, as
            RUN (its newest), RUN@best, RUN@v1.0, RUN@12; or a stock .keras file, which Keras loads.
        custom_objects: classes and functions by name, as for keras.saving.load_model(). Registered
            ones need not be named.
        compile: whether to compile the model as it was, with its optimizer's state.
        safe_mode: refuse lambdas, whose loading runs code.

    Returns:
        The model.

    Raises:
        NotFound: there is no such model, run or checkpoint.
        DataLoss: it is damaged.
        InvalidArgument: it was not saved from Keras; or its variables do not fit the model that
            the configuration makes: all that differ are listed.
        ValueError, TypeError: Keras cannot make the model: an object is not registered, or is a
            lambda and safe_mode is on.
    """
    name = os.fspath(path)
    if os.path.isfile(name) and (zipfile.is_zipfile(name) or name.endswith((".h5", ".hdf5"))):
        return keras.saving.load_model(
            name, custom_objects=custom_objects, compile=compile, safe_mode=safe_mode
        )
    name = _followed(name)
    sections = ["model", "optimizer"] if compile else ["model"]
    with open_address(name) as saved, BackgroundReader(saved, sections) as reader:
        with SkipInitialisation() as skipped:
            model = _make(saved, name, custom_objects, compile, safe_mode)
            optimizer = getattr(model, "optimizer", None)
            if optimizer is None or "optimizer" not in saved.tensors:
                sections = ["model"]
            elif compile and not optimizer.built:
                optimizer.build(model.trainable_variables)
        read_assets(model, saved)
        fill(model, saved, sections, reader, skipped.initialise_others)
        return model


def load_weights(
    model: Any, path: str | os.PathLike[str], *, include_optimizer: bool = False
) -> None:
    """Give a built model the weights of a saved one or of a checkpoint; needs no daemon.

    Every byte is checked before the first variable is assigned.

    Args:
        model: built, with the architecture of the one that was saved.
        path: as for load_model(), but for stock files, which model.load_weights() takes.
        include_optimizer: its optimizer's state too; the optimizer must be built.

    Raises:
        NotFound: there is no such model, run or checkpoint.
        DataLoss: it is damaged.
        InvalidArgument: it was not saved from Keras, or variables differ: all are listed by path,
            nothing was assigned.
    """
    name = _followed(os.fspath(path))
    sections = ("model", "optimizer") if include_optimizer else ("model",)
    with open_address(name) as saved, BackgroundReader(saved, sections) as reader:
        _recipe_of(saved, name)
        fill(model, saved, sections, reader)


def _followed(name: str) -> str:
    """What a name that ModelCheckpoint made leads to."""
    if not os.path.islink(name):
        return name
    found = os.path.realpath(name)
    if not os.path.isdir(found):
        # Retention removed the checkpoint.
        raise NotFound(f"{name} leads to {found}, which is not there any more")
    return found


def _make(
    saved: SavedCheckpoint,
    name: str,
    custom_objects: dict[str, Any] | None,
    compile: bool,
    safe_mode: bool,
) -> Any:
    try:
        config = _recipe_of(saved, name)["config"]["config"]
    except (KeyError, TypeError) as error:
        raise DataLoss(f"{name}: state.json has no configuration of the model") from error
    return saving_lib._model_from_config(config, custom_objects, compile, safe_mode)


def _recipe_of(saved: SavedCheckpoint, name: str) -> dict[str, Any]:
    recipe: dict[str, Any] | None = saved.state.get("keras")
    if recipe is None:
        framework = saved.manifest.get("framework") or "another framework"
        raise InvalidArgument(
            f"{name} comes from {framework}, not from Keras; load it with stillframe.torch, or "
            "its model.safetensors with the safetensors library"
        )
    return recipe
