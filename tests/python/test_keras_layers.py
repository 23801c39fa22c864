"""Layers whose state is more than variables, or hard to tell apart: they predict as before."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf

from command import ok
from stillframe.errors import InvalidArgument
from stillframe.keras import ModelCheckpoint, load_model, load_weights, save_model

_WORDS = tf.constant([["heat"], ["lamp"], ["unheard"]])
_X = np.random.default_rng(5).random((8, 3)).astype("float32")


def _text_model() -> Any:
    """With two vocabularies, one learned and one given."""
    keras.utils.set_random_seed(2)
    learned = keras.layers.TextVectorization(output_sequence_length=3)
    learned.adapt(["heat and light", "a lamp gives light"])
    given = keras.layers.StringLookup(vocabulary=["lamp", "heat"])
    words = keras.Input((1,), dtype="string")
    embedded = [
        keras.layers.Flatten()(keras.layers.Embedding(12, 4)(lookup(words)))
        for lookup in (learned, given)
    ]
    model = keras.Model(words, keras.layers.Concatenate()(embedded))
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def _predicts_the_same(one: Any, other: Any, x: Any) -> bool:
    return np.array_equal(one.predict(x, verbose=0), other.predict(x, verbose=0))


def _run_of(model: Any, run: Path) -> None:
    callback = ModelCheckpoint(run / "{epoch}.keras")
    callback.set_model(model)
    callback.on_train_begin()
    callback.on_epoch_begin(0)
    callback.on_epoch_end(0, {"loss": 0.5})
    callback.on_train_end()


def test_vocabularies_come_back_with_the_model(tmp_path: Path) -> None:
    model = _text_model()
    save_model(model, tmp_path / "model")
    assert _predicts_the_same(model, load_model(tmp_path / "model"), _WORDS)
    _run_of(model, tmp_path / "run")
    assert _predicts_the_same(model, load_model(f"{tmp_path}/run@latest"), _WORDS)
    # Weights alone are what load_weights() takes.
    other = _text_model()
    other.layers[3].embeddings.assign(other.layers[3].embeddings * 0)
    load_weights(other, tmp_path / "model")
    assert _predicts_the_same(model, other, _WORDS)


def test_vocabularies_go_to_a_keras_file_and_come_from_one(tmp_path: Path) -> None:
    model = _text_model()
    _run_of(model, tmp_path / "run")
    ok("export", tmp_path / "run", tmp_path / "out.keras", "--to", "keras")
    assert _predicts_the_same(model, keras.saving.load_model(tmp_path / "out.keras"), _WORDS)
    model.save(tmp_path / "stock.keras")
    ok("import", tmp_path / "stock.keras", tmp_path / "imported", "--from", "keras")
    assert _predicts_the_same(model, load_model(f"{tmp_path}/imported@latest"), _WORDS)


def test_learned_weights_of_words_that_no_new_layer_can_take_are_refused(tmp_path: Path) -> None:
    lookup = keras.layers.TextVectorization(output_mode="tf_idf", name="weighs")
    lookup.adapt(["heat and light", "a lamp gives light"])
    words = keras.Input((1,), dtype="string")
    with pytest.raises(InvalidArgument, match="'weighs' has adapted tf_idf weights"):
        save_model(keras.Model(words, lookup(words)), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_layer_that_finishes_its_state_when_it_is_loaded_does_so(tmp_path: Path) -> None:
    @keras.saving.register_keras_serializable("test_keras_layers")
    class Nested(keras.Model):  # type: ignore[misc,name-defined]
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.normal = keras.layers.Normalization()
            self.dense = keras.layers.Dense(2)

        def call(self, x: Any) -> Any:
            return self.dense(self.normal(x))

    scaled = keras.layers.Normalization()
    scaled.adapt(_X)
    flat = keras.Sequential([keras.Input((3,)), scaled, keras.layers.Dense(2)])
    nested = Nested()
    nested.normal.adapt(_X * 5)
    nested(_X)
    bounded = keras.layers.Discretization(num_bins=4)
    bounded.adapt(_X)
    binned = keras.Sequential([keras.Input((3,)), bounded])
    for name, model in {"flat": flat, "nested": nested, "binned": binned}.items():
        save_model(model, tmp_path / name)
        assert _predicts_the_same(model, load_model(tmp_path / name), _X), name


def test_a_model_that_was_compiled_and_never_trained_comes_back(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(keras.optimizers.Adam(0.125), "mse")
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert _predicts_the_same(model, again, _X)
    assert float(again.optimizer.learning_rate) == 0.125
    again.fit(_X, np.zeros((8, 2)), verbose=0)


def test_layers_of_the_same_name_keep_their_own_weights(tmp_path: Path) -> None:
    @keras.saving.register_keras_serializable("test_keras_layers")
    class Twins(keras.Model):  # type: ignore[misc,name-defined]
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.first = keras.layers.Dense(3, name="same")
            self.second = keras.layers.Dense(3, name="same")

        def call(self, x: Any) -> Any:
            return self.second(self.first(x))

    model = Twins()
    model(_X)
    save_model(model, tmp_path / "model")
    assert _predicts_the_same(model, load_model(tmp_path / "model"), _X)


def test_a_file_of_an_older_keras_loads(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.save(tmp_path / "new.keras")
    with (
        zipfile.ZipFile(tmp_path / "new.keras") as new,
        zipfile.ZipFile(tmp_path / "old.keras", "w") as old,
    ):
        for name in new.namelist():
            content = new.read(name)
            if name == "metadata.json":
                content = json.dumps(json.loads(content) | {"keras_version": "3.0.0"}).encode()
            old.writestr(name, content)
    assert _predicts_the_same(model, load_model(tmp_path / "old.keras"), _X)
    ok("import", tmp_path / "old.keras", tmp_path / "run", "--from", "keras")
    assert _predicts_the_same(model, load_model(f"{tmp_path}/run@latest"), _X)
