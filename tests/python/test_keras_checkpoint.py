"""ModelCheckpoint in a real fit(), against a real daemon."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

keras = pytest.importorskip("keras", reason="keras is not installed")

from stillframe._core.session import list_run  # noqa: E402
from stillframe.errors import InvalidArgument, StillframeWarning  # noqa: E402
from stillframe.keras import ModelCheckpoint  # noqa: E402

_X = np.random.default_rng(7).random((24, 6)).astype("float32")
_Y = _X.sum(axis=1, keepdims=True)


def _model(optimizer: str = "adam") -> Any:
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.layers.Input((6,)),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.2, seed=2),
            keras.layers.Dense(1),
        ]
    )
    model.compile(optimizer, "mse", metrics=["mae"])
    return model


def _fit(model: Any, callback: Any, epochs: int = 3, **how: Any) -> None:
    model.fit(_X, _Y, batch_size=8, epochs=epochs, verbose=0, callbacks=[callback], **how)


def _left(run: Path, count: int) -> list[dict[str, Any]]:
    """The checkpoints of the run, once old ones were removed, which is done behind fit()."""
    deadline = time.monotonic() + 10
    while len(list_run(str(run))) > count and time.monotonic() < deadline:
        time.sleep(0.05)
    return list_run(str(run))


def _feed(callback: Any, model: Any, values: list[float]) -> None:
    """Epochs whose logs say these losses."""
    callback.set_model(model)
    callback.on_train_begin()
    for epoch, value in enumerate(values):
        callback.on_epoch_begin(epoch)
        callback.on_epoch_end(epoch, {"val_loss": value})
    callback.on_train_end()


def test_each_epoch_is_a_checkpoint_named_as_keras_would(tmp_path: Path) -> None:
    model = _model()
    _fit(model, ModelCheckpoint(tmp_path / "{epoch:02d}-{mae:.1f}.keras", monitor="loss"))
    links = sorted(path.name for path in tmp_path.iterdir() if path.name.endswith(".keras"))
    assert [name[:3] for name in links] == ["01-", "02-", "03-"]
    entries = list_run(str(tmp_path))
    assert [entry["step"] for entry in entries] == [3, 6, 9]
    assert set(entries[0]["metrics"]) == {"loss", "mae"}
    newest = tmp_path / links[-1]
    assert newest.is_symlink()
    assert newest.resolve() == Path(entries[-1]["path"]).resolve()
    weights = safetensors.numpy.load_file(newest / "model.safetensors")
    dense = model.layers[0].kernel
    assert weights["layers/dense/0"].tobytes() == keras.ops.convert_to_numpy(dense).tobytes()


def test_saves_by_batches_count_across_epochs(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "b{batch:02d}-e{epoch}.keras", save_freq=2)
    _fit(_model(), callback, epochs=2)
    assert [entry["step"] for entry in list_run(str(tmp_path))] == [2, 4, 6]


def test_best_only_with_a_number_of_batches_works_in_the_first_epoch(tmp_path: Path) -> None:
    callback = ModelCheckpoint(
        tmp_path / "best.keras", monitor="loss", save_best_only=True, save_freq=1
    )
    _fit(_model(), callback, epochs=1)
    assert len(_left(tmp_path, 1)) == 1
    assert (tmp_path / "best.keras").is_symlink()


def test_the_best_value_survives_a_restart(tmp_path: Path) -> None:
    model = _model()
    _fit(model, ModelCheckpoint(tmp_path / "first.keras"), epochs=1, validation_split=0.5)
    path = tmp_path / "run" / "best.keras"
    _feed(ModelCheckpoint(path, save_best_only=True), model, [0.5, 0.25])
    again = ModelCheckpoint(path, save_best_only=True)
    _feed(again, model, [0.4, 0.3])
    assert again.best == 0.25
    assert [entry["metrics"]["val_loss"] for entry in list_run(str(path.parent))] == [0.25]


def test_nan_is_never_best(tmp_path: Path) -> None:
    model = _model()
    _fit(model, ModelCheckpoint(tmp_path / "first.keras"), epochs=1, validation_split=0.5)
    callback = ModelCheckpoint(tmp_path / "run" / "{epoch}.keras", save_best_only=True)
    _feed(callback, model, [math.nan, 1.0, math.nan, 0.5])
    values = [entry["metrics"]["val_loss"] for entry in list_run(str(tmp_path / "run"))]
    assert values == [1.0, 0.5]


def test_a_monitor_that_never_appears_is_warned_of_and_saved_as_keras_does(
    tmp_path: Path,
) -> None:
    callback = ModelCheckpoint(tmp_path / "best.keras", monitor="val_f1", save_best_only=True)
    with pytest.warns(StillframeWarning, match="val_f1 is not available, only: loss, mae"):
        _fit(_model(), callback, epochs=1)
    assert len(list_run(str(tmp_path))) == 1


def test_a_direction_that_is_not_needed_is_not_asked_for(tmp_path: Path) -> None:
    _fit(_model(), ModelCheckpoint(tmp_path / "{epoch}.keras", monitor="anything"), epochs=1)
    assert len(list_run(str(tmp_path))) == 1


def test_without_placeholders_each_save_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    _fit(_model(), ModelCheckpoint(tmp_path / "model.weights.h5", save_weights_only=True))
    entries = _left(tmp_path, 1)
    assert [entry["step"] for entry in entries] == [9]
    assert (tmp_path / "model.weights.h5").resolve().name == Path(entries[0]["path"]).name
    assert not (Path(entries[0]["path"]) / "optimizer.safetensors").exists()


def test_what_training_writes_during_the_capture_does_not_get_into_it(tmp_path: Path) -> None:
    """Each checkpoint holds exactly the weights of its epoch's end."""
    for capture in ("eager",) if keras.backend.backend() == "torch" else ("eager", "lazy"):
        seen: list[bytes] = []

        class Witness(keras.callbacks.Callback):  # type: ignore[misc,name-defined]
            def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
                seen.append(keras.ops.convert_to_numpy(self.model.layers[0].kernel).tobytes())  # noqa: B023

        run = tmp_path / capture
        checkpoint = ModelCheckpoint(run / "{epoch}.keras", capture=capture)  # type: ignore[arg-type]
        model = _model()
        model.fit(_X, _Y, batch_size=2, epochs=6, verbose=0, callbacks=[Witness(), checkpoint])
        kept = [
            safetensors.numpy.load_file(Path(entry["path"]) / "model.safetensors")
            for entry in list_run(str(run))
        ]
        assert [weights["layers/dense/0"].tobytes() for weights in kept] == seen


def test_a_file_in_the_place_of_a_link_is_left_alone(tmp_path: Path) -> None:
    _fit(_model(), ModelCheckpoint(tmp_path / "{epoch}.keras"), epochs=1)
    mine = tmp_path / "model.keras"
    mine.write_text("mine")
    _fit(_model(), ModelCheckpoint(mine, keep_last=2), epochs=1)
    assert mine.read_text() == "mine"
    assert len(list_run(str(tmp_path))) == 2


def test_a_directory_of_other_things_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidArgument, match="neither empty nor a run.*notes.txt"):
        _fit(_model(), ModelCheckpoint(tmp_path / "model.keras"), epochs=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"filepath": "run/model.pt"}, r"must end in \.keras"),
        ({"filepath": "run/m.keras", "save_weights_only": True}, r"must end in \.weights\.h5"),
        ({"filepath": "run/{epoch}/m.keras"}, "its directory is the run"),
        ({"filepath": "run/m.keras", "mode": "best"}, "mode is 'best'"),
        ({"filepath": "run/m.keras", "save_freq": 0}, "save_freq is 0"),
        ({"filepath": "run/m.keras", "keep_last": 0}, "keep_last is 0"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        ModelCheckpoint(**arguments)


def test_a_placeholder_that_is_no_metric_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="names .*f1.* not in the logs"):
        _fit(_model(), ModelCheckpoint(tmp_path / "{f1}.keras"), epochs=1)
