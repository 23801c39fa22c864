"""Stock files of Keras: exported from checkpoints of Keras runs, and imported into runs."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import h5py
import keras
import numpy as np
import pytest
import torch

import stillframe.keras
from command import ok, refused


def _trained(dtype: str = "float32") -> Any:
    keras.utils.set_random_seed(6)
    model = keras.Sequential(
        [
            keras.layers.Input((5,)),
            keras.layers.Dense(7, "relu", dtype=dtype),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.2, seed=1),
            keras.layers.Dense(2, name="head"),
        ]
    )
    model.compile("adam", "mse")
    model.fit(np.random.rand(16, 5), np.random.rand(16, 2), epochs=2, verbose=0)
    return model


def _run_of(model: Any, run: Path) -> None:
    """A run with the model as its one checkpoint."""
    callback = stillframe.keras.ModelCheckpoint(run / "{epoch}.keras")
    callback.set_model(model)
    callback.on_train_begin()
    callback.on_epoch_begin(0)
    callback.on_epoch_end(0, {"loss": 0.5, "val_loss": 0.25})
    callback.on_train_end()


def _assert_equal(one: Any, other: Any, *, optimizer: bool = True) -> None:
    assert len(one.weights) == len(other.weights)
    # Seed generators are in no file of Keras.
    for a, b in zip(one.weights, other.weights, strict=True):
        if "seed" not in a.path:
            assert np.array_equal(a.numpy(), b.numpy()), a.path
    if optimizer:
        for a, b in zip(one.optimizer.variables, other.optimizer.variables, strict=True):
            assert np.array_equal(a.numpy(), b.numpy()), a.path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_exported_file_is_one_that_keras_loads_to_the_same_bits(
    dtype: str, tmp_path: Path
) -> None:
    model = _trained(dtype)
    _run_of(model, tmp_path / "run")
    answer = ok("export", f"{tmp_path}/run@latest", tmp_path / "out.keras", "--to", "keras")
    assert answer["files"] == ["out.keras"]
    assert any("seed generators" in note for note in answer["notes"])
    loaded = keras.saving.load_model(tmp_path / "out.keras")
    _assert_equal(loaded, model)
    with zipfile.ZipFile(tmp_path / "out.keras") as archive:
        assert archive.testzip() is None


def test_exported_weights_are_those_that_keras_writes(tmp_path: Path) -> None:
    model = _trained()
    _run_of(model, tmp_path / "run")
    ok("export", f"{tmp_path}/run", tmp_path / "out.weights.h5", "--to", "keras")
    model.save_weights(tmp_path / "stock.weights.h5")

    def contents(path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        with h5py.File(path) as file:
            file.visititems(
                lambda name, one: (
                    found.update({name: one[()]}) if isinstance(one, h5py.Dataset) else None
                )
            )
        return found

    ours, stock = contents(tmp_path / "out.weights.h5"), contents(tmp_path / "stock.weights.h5")
    # Keras's file has the seed generator beside the weights of its layer.
    assert {name for name in stock if "seed" not in name} == {
        name for name in ours if "seed" not in name
    }
    assert all(np.array_equal(stock[name], ours[name]) for name in ours)
    other = _trained()
    for weight in other.weights:
        weight.assign(weight * 0)
    other.load_weights(tmp_path / "out.weights.h5")
    _assert_equal(other, model, optimizer=False)


def test_without_the_optimizer_the_file_has_weights_alone(tmp_path: Path) -> None:
    _run_of(_trained(), tmp_path / "run")
    ok("export", tmp_path / "run", tmp_path / "k.weights.h5", "--to", "keras", "--only", "model")
    with h5py.File(tmp_path / "k.weights.h5") as file:
        assert "optimizer" not in file
        assert "layers" in file


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stock_file_becomes_a_checkpoint_that_loads_to_the_same_bits(
    dtype: str, tmp_path: Path
) -> None:
    model = _trained(dtype)
    model.save(tmp_path / "stock.keras")
    words = ("--from", "keras", "--step", "12", "--metric", "val_loss=0.25")
    ok("import", tmp_path / "stock.keras", tmp_path / "run", *words)
    loaded = stillframe.keras.load_model(f"{tmp_path}/run@latest")
    _assert_equal(loaded, model)
    ok("verify", tmp_path / "run")
    # And back.
    ok("export", f"{tmp_path}/run@latest", tmp_path / "again.keras", "--to", "keras")
    _assert_equal(keras.saving.load_model(tmp_path / "again.keras"), model)


def test_runs_of_keras_and_of_torch_are_treated_alike_by_the_commands(tmp_path: Path) -> None:
    from stillframe.torch import Checkpointer

    _run_of(_trained(), tmp_path / "keras")
    with Checkpointer(tmp_path / "torch", model=torch.nn.Linear(2, 2)) as checkpointer:
        checkpointer.save(3, metrics={"val_loss": 0.5})
    for name in ("keras", "torch"):
        run = tmp_path / name
        (entry,) = ok("ls", run)["checkpoints"]
        assert "val_loss" in entry["metrics"]
        ok("verify", run)
        ok("tag", f"{run}@latest", "v1")
        best = ok("best", run, "--metric", "val_loss", "--mode", "min")
        assert best
        shown = ok("show", f"{run}@v1")
        assert shown["parts"][0]["file"] == "model.safetensors"
        ok("export", f"{run}@v1", tmp_path / f"{name}.safetensors", "--to", "safetensors")
    assert stillframe.keras.load_model(f"{tmp_path}/keras@v1").layers[-1].name == "head"


# --- Bad input ------------------------------------------------------------------------------------


def test_a_name_with_another_ending_is_refused(tmp_path: Path) -> None:
    _run_of(_trained(), tmp_path / "run")
    said = refused("export", tmp_path / "run", tmp_path / "out.h5", "--to", "keras")
    assert "must end in .keras" in said
    assert not (tmp_path / "out.h5").exists()


def test_damage_stops_an_export_and_leaves_no_file(tmp_path: Path) -> None:
    _run_of(_trained(), tmp_path / "run")
    part = next(tmp_path.glob("run/0*/model.safetensors"))
    raw = bytearray(part.read_bytes())
    raw[-2] ^= 8
    part.write_bytes(raw)
    words = ("export", tmp_path / "run", tmp_path / "out.keras", "--to", "keras")
    refused(*words, code=4)
    assert list(tmp_path.glob("out*")) == []


@pytest.mark.parametrize("kind", ["cut", "flipped", "text", "keras 2", "weights", "none"])
def test_a_foreign_file_that_cannot_be_imported_is_named_and_makes_no_run(
    kind: str, tmp_path: Path
) -> None:
    path = tmp_path / ("m.weights.h5" if kind == "weights" else "m.keras")
    model = _trained()
    if kind == "weights":
        model.save_weights(path)
    elif kind in ("cut", "flipped"):
        model.save(path)
        raw = bytearray(path.read_bytes())
        if kind == "flipped":
            raw[len(raw) // 2] ^= 1
        path.write_bytes(raw[: len(raw) // 2] if kind == "cut" else raw)
    elif kind == "text":
        path.write_text("not a model")
    elif kind == "keras 2":
        # A whole-model file of Keras 2 is HDF5, whatever its name.
        with h5py.File(path, "w") as file:
            file["model_weights"] = np.ones(3)
    reasons = {
        "cut": (4, "truncated"),
        "flipped": (4, "CRC-32"),
        "text": (4, "no zip file"),
        "keras 2": (4, "no zip file"),
        "weights": (1, "do not say what model"),
        "none": (3, "no such file"),
    }
    code, reason = reasons[kind]
    said = refused("import", path, tmp_path / "run", "--from", "keras", code=code)
    assert reason in said
    assert not (tmp_path / "run").exists()
