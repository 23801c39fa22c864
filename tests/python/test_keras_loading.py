"""Large variables of a Keras model that is loaded: read meanwhile, never given first values."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="keras is not installed")

from stillframe._keras.skip_init import SkipInitialisation  # noqa: E402
from stillframe._keras.state import KerasState  # noqa: E402
from stillframe.errors import DataLoss  # noqa: E402
from stillframe.keras import load_model, save_model  # noqa: E402

# A kernel of it is larger than what is always initialised.
_WIDTH = 8192
_X = np.random.default_rng(3).random((16, 4)).astype("float32")
_Y = _X.sum(axis=1, keepdims=True)


@keras.saving.register_keras_serializable("test_keras_loading")
class Counted(keras.initializers.Initializer):  # type: ignore[misc,name-defined]
    calls = 0

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        Counted.calls += 1
        return keras.ops.full(shape, 0.125, dtype)

    def get_config(self) -> dict[str, Any]:
        return {}


def _trained() -> Any:
    layers = [
        keras.layers.Input((4,)),
        keras.layers.Dense(_WIDTH, kernel_initializer=Counted()),
        keras.layers.Dense(1),
    ]
    keras.utils.set_random_seed(1)
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(_X, _Y, epochs=1, verbose=0)
    return model


def _bytes(variables: Any) -> list[bytes]:
    return [one.numpy().tobytes() for one in variables]


def test_no_first_values_are_computed_for_what_is_loaded(tmp_path: Path) -> None:
    model = _trained()
    save_model(model, tmp_path / "model")
    Counted.calls = 0
    again = load_model(tmp_path / "model")
    assert Counted.calls == 0
    assert _bytes(model.variables) == _bytes(again.variables)
    assert _bytes(model.optimizer.variables) == _bytes(again.optimizer.variables)
    for one in (model, again):
        one.fit(_X, _Y, epochs=2, verbose=0, shuffle=False)
    assert _bytes(model.variables) == _bytes(again.variables)


def test_moments_that_were_not_saved_begin_as_zeros(tmp_path: Path) -> None:
    save_model(_trained(), tmp_path / "model", include_optimizer=False)
    again = load_model(tmp_path / "model")
    if not again.optimizer.built:
        again.optimizer.build(again.trainable_variables)
    moments = [one for one in again.optimizer.variables if one.shape == (4, _WIDTH)]
    assert len(moments) == 2
    assert not any(np.any(one.numpy()) for one in moments)


@keras.saving.register_keras_serializable("test_keras_loading")
class Halved(keras.layers.Layer):  # type: ignore[misc,name-defined]
    """Saves another tensor than its variable."""

    def build(self, input_shape: Any) -> None:
        self.table = self.add_weight(shape=(4, _WIDTH), initializer="ones", trainable=False)

    def call(self, inputs: Any) -> Any:
        return keras.ops.matmul(inputs, self.table)

    def save_own_variables(self, store: Any) -> None:
        store["half"] = self.table.numpy() / 2

    def load_own_variables(self, store: Any) -> None:
        self.table.assign(2 * np.asarray(store["half"]))


def test_what_a_layer_loads_by_itself_is_not_given_first_values_after_that(tmp_path: Path) -> None:
    model = keras.Sequential([keras.layers.Input((4,)), Halved(), keras.layers.Dense(1)])
    model.layers[0].table.assign(np.full((4, _WIDTH), 6, "float32"))
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert np.all(again.layers[0].table.numpy() == 6)


def test_a_model_that_cannot_be_made_leaves_keras_as_it_was(tmp_path: Path) -> None:
    save_model(_trained(), tmp_path / "model")
    with keras.saving.custom_object_scope({}):
        registered = keras.saving.get_custom_objects()
        kept = registered.pop("test_keras_loading>Counted")
        try:
            with pytest.raises((TypeError, ValueError), match="Counted"):
                load_model(tmp_path / "model")
        finally:
            registered["test_keras_loading>Counted"] = kept
    layer = keras.layers.Dense(_WIDTH, kernel_initializer="ones")
    layer.build((None, 4))
    assert np.all(layer.kernel.numpy() == 1)


def test_variables_of_other_threads_have_their_first_values() -> None:
    made: list[Any] = []

    def make() -> None:
        made.append(keras.Variable("ones", shape=(4, _WIDTH)))

    with SkipInitialisation(), SkipInitialisation() as inner:
        other = threading.Thread(target=make)
        other.start()
        other.join()
        make()
        assert np.all(made[0].numpy() == 1)
    assert not inner._skipped
    make()
    assert np.all(made[2].numpy() == 1)


def test_what_is_skipped_and_not_loaded_has_its_first_value_in_the_end() -> None:
    with SkipInitialisation() as skipped:
        model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(_WIDTH)])
        other = keras.Variable("ones", shape=(4, _WIDTH), dtype="bfloat16")
        small = keras.Variable("ones", shape=(4,))
    model.layers[0].kernel.assign(np.full((4, _WIDTH), 2, "float32"))
    skipped.initialise_others(KerasState(model, ["model"]))
    assert np.all(model.layers[0].kernel.numpy() == 2)
    assert np.all(other.numpy().astype("float32") == 1)
    assert np.all(small.numpy() == 1)


def test_damage_that_is_found_while_the_model_is_made_is_told(tmp_path: Path) -> None:
    save_model(_trained(), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataLoss, match="extent 0"):
        load_model(tmp_path / "model")
