"""BackupAndRestore: real trainings in processes of their own, killed by SIGKILL."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="keras is not installed")

from stillframe._core.saver import SaverOptions  # noqa: E402
from stillframe._core.session import AttachOptions, list_run  # noqa: E402
from stillframe._keras.run import KerasRun  # noqa: E402
from stillframe.errors import InvalidArgument, StillframeWarning  # noqa: E402
from stillframe.keras import BackupAndRestore  # noqa: E402

_TRAINING = Path(__file__).with_name("keras_training.py")
_KILLED = -9


def _train(
    run: Path, data: str, kill_at: int = 0, backend: str = "tensorflow"
) -> tuple[int, list[str], str]:
    """Exit status, lines, and what was warned of."""
    done = subprocess.run(
        [sys.executable, str(_TRAINING), str(run), data, str(kill_at)],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.timeout(600)  # Three starts of TensorFlow.
@pytest.mark.parametrize(
    ("backend", "data"),
    [
        ("tensorflow", "seeded"),
        ("tensorflow", "arrays"),
        ("tensorflow", "unknown-length"),
        ("torch", "arrays"),
        ("jax", "seeded"),
    ],
)
def test_a_fit_killed_inside_an_epoch_ends_like_one_that_was_not(
    tmp_path: Path, backend: str, data: str
) -> None:
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    status, whole, errors = _train(tmp_path / "whole", data, backend=backend)
    assert status == 0, errors
    status, first, errors = _train(tmp_path / "run", data, kill_at=19, backend=backend)
    assert status == _KILLED, errors
    assert first[-1] == "batch 1.7"
    status, rest, errors = _train(tmp_path / "run", data, backend=backend)
    assert status == 0, errors
    # The last save was after 14 batches; each of the others sees a batch once.
    assert rest[0] == "batch 1.3"
    assert first[:14] + rest == whole
    assert "StillframeWarning" not in errors


@pytest.mark.parametrize(
    ("data", "reason"),
    [("unseeded", "the tf.data shuffle has no seed"), ("generator", "a Python generator")],
)
def test_where_the_order_cannot_be_the_same_the_epoch_is_begun_anew_and_that_is_said(
    tmp_path: Path, data: str, reason: str
) -> None:
    assert _train(tmp_path, data, kill_at=19)[0] == _KILLED
    status, rest, errors = _train(tmp_path, data)
    assert status == 0, errors
    assert rest[0] == "batch 1.0"
    assert f"epoch 2 is begun anew after 3 of its batches: {reason}" in errors


_X = np.random.default_rng(7).random((24, 6)).astype("float32")


def _model(units: int = 8) -> Any:
    model = keras.Sequential([keras.layers.Input((6,)), keras.layers.Dense(units)])
    model.compile("adam", "mse")
    return model


def _fit(model: Any, *callbacks: Any, epochs: int = 2) -> Any:
    y = np.zeros((24, model.output_shape[1]), "float32")
    return model.fit(_X, y, batch_size=8, epochs=epochs, verbose=0, callbacks=list(callbacks))


def test_a_fit_that_had_ended_restores_and_trains_no_more(tmp_path: Path) -> None:
    keras.utils.set_random_seed(1)
    first = _model()
    _fit(first, BackupAndRestore(tmp_path))
    second = _model()
    history = _fit(second, BackupAndRestore(tmp_path))
    assert history.history == {}
    assert first.layers[0].kernel.numpy().tobytes() == second.layers[0].kernel.numpy().tobytes()


def test_the_first_epoch_it_sets_does_not_stay_for_the_next_fit(tmp_path: Path) -> None:
    keras.utils.set_random_seed(1)
    _fit(_model(), BackupAndRestore(tmp_path))
    model = _model()
    _fit(model, BackupAndRestore(tmp_path), epochs=3)
    assert len(_fit(model, epochs=1).history["loss"]) == 1


def test_a_fit_that_ended_by_itself_may_take_its_checkpoints_along(tmp_path: Path) -> None:
    keras.utils.set_random_seed(1)
    run = tmp_path / "run"
    for _ in range(2):
        history = _fit(_model(), BackupAndRestore(run, delete_checkpoint=True))
        assert len(history.history["loss"]) == 2
        assert list_run(str(run)) == []


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_loudly(tmp_path: Path) -> None:
    keras.utils.set_random_seed(1)
    _fit(_model(), BackupAndRestore(tmp_path))
    newest = list_run(str(tmp_path))[-1]
    (Path(newest["path"]) / "state.json").write_text("{}")
    with pytest.warns(StillframeWarning, match="checkpoint .* instead"):
        history = _fit(_model(), BackupAndRestore(tmp_path), epochs=2)
    assert len(history.history["loss"]) == 1


def test_another_architecture_is_refused_and_nothing_is_assigned(tmp_path: Path) -> None:
    keras.utils.set_random_seed(1)
    _fit(_model(8), BackupAndRestore(tmp_path))
    other = _model(5)
    before = other.layers[0].kernel.numpy().tobytes()
    with pytest.raises(InvalidArgument, match=r"kernel \(layers/dense/0\) is F32 \[6, 5\], in the"):
        _fit(other, BackupAndRestore(tmp_path), epochs=3)
    assert other.layers[0].kernel.numpy().tobytes() == before


def test_other_callbacks_than_at_the_save_are_refused_by_name(tmp_path: Path) -> None:
    keras.utils.set_random_seed(1)
    _fit(_model(), BackupAndRestore(tmp_path))
    stopping = keras.callbacks.EarlyStopping("loss")
    with pytest.raises(InvalidArgument, match="names EarlyStopping; .* states of none"):
        _fit(_model(), BackupAndRestore(tmp_path, callbacks=[stopping]), stopping)


def test_a_model_that_is_not_built_is_refused_before_training(tmp_path: Path) -> None:
    model = keras.Sequential([keras.layers.Dense(2)])
    model.compile("adam", "mse")
    with pytest.raises(InvalidArgument, match="the model is not built"):
        model.fit(_X, _X[:, :2], verbose=0, callbacks=[BackupAndRestore(tmp_path)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "int32", "uint8", "bool"])
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    class Holder(keras.layers.Layer):  # type: ignore[misc,name-defined]
        def build(self, shape: Any) -> None:
            self.values = self.add_weight(
                shape=(3, 5), dtype=dtype, trainable=False, initializer="zeros", autocast=False
            )
            self.scalar = self.add_weight(
                shape=(), dtype=dtype, trainable=False, initializer="ones", autocast=False
            )
            self.nothing = self.add_weight(
                shape=(0, 2), dtype=dtype, trainable=False, initializer="zeros", autocast=False
            )

        def call(self, inputs: Any) -> Any:
            return inputs

    def built() -> Any:
        model = keras.Sequential([keras.layers.Input((1,)), Holder(), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        return model

    saved = built()
    layer = saved.layers[0]
    layer.values.assign(keras.ops.cast(np.arange(15).reshape(3, 5) % 2, dtype))
    run = KerasRun(AttachOptions(directory=str(tmp_path)), SaverOptions())
    run.save(saved, 1).wait()
    other = built()
    run.restore(other)
    for one, two in zip(layer.variables, other.layers[0].variables, strict=True):
        assert one.numpy().tobytes() == two.numpy().tobytes()
        assert one.dtype == two.dtype
    run.saver.close()
