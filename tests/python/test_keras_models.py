"""Whole Keras models: saved, loaded, refused; no daemon runs for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

keras = pytest.importorskip("keras", reason="keras is not installed")

import stillframe.torch  # noqa: E402
from stillframe.errors import DataLoss, InvalidArgument, NotFound  # noqa: E402
from stillframe.keras import ModelCheckpoint, load_model, save_model  # noqa: E402

_X = np.random.default_rng(3).random((16, 4)).astype("float32")
_Y = _X.sum(axis=1, keepdims=True)


def _trained(*layers: Any) -> Any:
    keras.utils.set_random_seed(1)
    stack = layers or (keras.layers.Dense(3, activation="relu"), keras.layers.Dense(1))
    model = keras.Sequential([keras.layers.Input((4,)), *stack])
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    model.fit(_X, _Y, epochs=1, verbose=0)
    return model


def _same(one: Any, two: Any) -> bool:
    pairs = zip(one, two, strict=True)
    return all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in pairs)


def test_a_model_comes_back_and_trains_on_as_if_it_had_not_left(tmp_path: Path) -> None:
    model = _trained()
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert _same(model.variables, again.variables)
    assert _same(model.optimizer.variables, again.optimizer.variables)
    for one in (model, again):
        one.fit(_X, _Y, epochs=2, verbose=0, shuffle=False)
    assert _same(model.variables, again.variables)
    weights = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    assert weights["layers/dense/0"].shape == (4, 3)


def test_without_compile_and_without_the_optimizer_it_predicts_the_same(tmp_path: Path) -> None:
    model = _trained()
    save_model(model, tmp_path / "model", include_optimizer=False)
    assert not (tmp_path / "model" / "optimizer.safetensors").exists()
    again = load_model(tmp_path / "model", compile=False)
    assert getattr(again, "optimizer", None) is None
    assert np.array_equal(model.predict(_X, verbose=0), again.predict(_X, verbose=0))


def test_names_of_a_model_checkpoint_and_selectors_open(tmp_path: Path) -> None:
    model = _trained()
    run = tmp_path / "run"
    callback = ModelCheckpoint(run / "{epoch:02d}.keras", monitor="loss", keep_best=1)
    model.fit(_X, _Y, epochs=2, verbose=0, callbacks=[callback])
    for path in (run / "02.keras", run, f"{run}@latest", f"{run}@best"):
        assert _same(model.variables, load_model(path).variables)


def test_a_name_whose_checkpoint_was_removed_says_so(tmp_path: Path) -> None:
    (tmp_path / "old.keras").symlink_to("00000001-step-1")
    with pytest.raises(NotFound, match="leads to .* not there any more"):
        load_model(tmp_path / "old.keras")


def test_a_stock_keras_file_loads_too(tmp_path: Path) -> None:
    model = _trained()
    model.save(tmp_path / "stock.keras")
    assert _same(model.variables, load_model(tmp_path / "stock.keras").variables)


def test_a_second_save_takes_the_place_of_the_first(tmp_path: Path) -> None:
    model = _trained()
    for _ in range(2):
        model.fit(_X, _Y, epochs=1, verbose=0)
        save_model(model, tmp_path / "model")
    assert _same(model.variables, load_model(tmp_path / "model").variables)


def test_registered_objects_are_found_and_others_are_named(tmp_path: Path) -> None:
    @keras.saving.register_keras_serializable("test_keras_models")
    class Doubled(keras.layers.Layer):  # type: ignore[misc,name-defined]
        def call(self, inputs: Any) -> Any:
            return 2 * inputs

    class Tripled(keras.layers.Layer):  # type: ignore[misc,name-defined]
        def call(self, inputs: Any) -> Any:
            return 3 * inputs

    known = _trained(Doubled(), keras.layers.Dense(1))
    save_model(known, tmp_path / "known")
    assert _same(known.variables, load_model(tmp_path / "known").variables)
    unknown = _trained(Tripled(), keras.layers.Dense(1))
    save_model(unknown, tmp_path / "unknown")
    with pytest.raises((TypeError, ValueError), match="Tripled"):
        load_model(tmp_path / "unknown")
    named = load_model(tmp_path / "unknown", custom_objects={"Tripled": Tripled})
    assert _same(unknown.variables, named.variables)


def test_a_layer_with_variables_of_its_own_saving_keeps_them(tmp_path: Path) -> None:
    @keras.saving.register_keras_serializable("test_keras_models")
    class Halved(keras.layers.Layer):  # type: ignore[misc,name-defined]
        def build(self, shape: Any) -> None:
            self.scale = self.add_weight(shape=(2,), initializer="zeros")

        def call(self, inputs: Any) -> Any:
            return inputs * self.scale[0]

        def save_own_variables(self, store: Any) -> None:
            store["halves"] = self.scale.numpy() / 2

        def load_own_variables(self, store: Any) -> None:
            self.scale.assign(np.asarray(store["halves"]) * 2)

    model = _trained(Halved(), keras.layers.Dense(1))
    model.layers[0].scale.assign([3.0, 5.0])
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert again.layers[0].scale.numpy().tolist() == [3.0, 5.0]
    assert _same(model.layers[1].variables, again.layers[1].variables)


def test_lambdas_are_refused_in_safe_mode(tmp_path: Path) -> None:
    model = _trained(keras.layers.Lambda(lambda x: x * 2), keras.layers.Dense(1))
    save_model(model, tmp_path / "model")
    with pytest.raises(ValueError, match="safe"):
        load_model(tmp_path / "model")
    assert _same(model.variables, load_model(tmp_path / "model", safe_mode=False).variables)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    save_model(_trained(), tmp_path / "model")
    part = tmp_path / "model" / "model.safetensors"
    damaged = bytearray(part.read_bytes())
    damaged[-3] ^= 1
    part.write_bytes(damaged)
    with pytest.raises(DataLoss):
        load_model(tmp_path / "model")


def test_a_checkpoint_of_pytorch_is_named_as_one(tmp_path: Path) -> None:
    stillframe.torch.save_model(torch.nn.Sequential(torch.nn.Linear(2, 1)), tmp_path / "model")
    with pytest.raises(InvalidArgument, match=r"comes from torch .* not from Keras"):
        load_model(tmp_path / "model")


def test_a_model_that_is_not_built_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="is not built"):
        save_model(keras.Sequential([keras.layers.Dense(1)]), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_weights_are_loaded_into_a_built_model(tmp_path: Path) -> None:
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
    stillframe.keras.save_model(model, tmp_path / "m")
    other = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
    stillframe.keras.load_weights(other, tmp_path / "m")
    assert all(map(np.array_equal, other.get_weights(), model.get_weights()))
    larger = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(5)])
    before = larger.get_weights()
    with pytest.raises(stillframe.keras.InvalidArgument, match="2 differences"):
        stillframe.keras.load_weights(larger, tmp_path / "m")
    assert all(map(np.array_equal, larger.get_weights(), before))
