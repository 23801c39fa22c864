"""A Keras training that can be killed: run as a program, it prints one digest at its end.

python keras_training.py RUN DATA KILL_AT: trains four epochs with BackupAndRestore in RUN; at
batch KILL_AT (counted over this process, 0: never) it kills itself.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from stillframe.keras import BackupAndRestore

_X = np.random.default_rng(7).random((44, 6)).astype("float32")
_Y = _X.sum(axis=1, keepdims=True)


class Seen(keras.callbacks.Callback):  # type: ignore[misc]
    """Prints each batch that a callback sees; kills the process at one."""

    def __init__(self, kill_at: int) -> None:
        super().__init__()
        self._left = kill_at

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        print(f"batch {self._epoch}.{batch}", flush=True)
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def model() -> Any:
    built = keras.Sequential(
        [
            keras.layers.Input((6,)),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(1),
        ]
    )
    built.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    return built


def data(kind: str) -> dict[str, Any]:
    """Arguments of fit()."""
    if kind == "arrays":
        return {"x": _X, "y": _Y, "batch_size": 4, "shuffle": True}
    if kind == "generator":
        batches = ((_X[i : i + 4], _Y[i : i + 4]) for _ in range(9) for i in range(0, 44, 4))
        return {"x": batches, "steps_per_epoch": 11}
    dataset = tf.data.Dataset.from_tensor_slices((_X, _Y))
    seed = None if kind == "unseeded" else 3
    dataset = dataset.shuffle(44, seed=seed, reshuffle_each_iteration=True)
    if kind == "unknown-length":
        dataset = dataset.filter(lambda x, y: True)
    return {"x": dataset.batch(4)}


def main() -> None:
    run, kind, kill_at = sys.argv[1:]
    if kind != "unseeded":
        keras.utils.set_random_seed(11)
    warnings.filterwarnings("ignore", message="Your input ran out of data")
    trained = model()
    stopping = keras.callbacks.EarlyStopping(
        "val_loss", min_delta=0.001, patience=3, restore_best_weights=True
    )
    slower = keras.callbacks.ReduceLROnPlateau("loss", min_delta=10.0, patience=1, factor=0.5)
    backup = BackupAndRestore(run, save_freq=7, callbacks=[stopping, slower])
    history = trained.fit(
        **data(kind),
        epochs=4,
        verbose=0,
        validation_data=(_X, _Y),
        callbacks=[backup, stopping, slower, Seen(int(kill_at))],
    )
    digest = hashlib.sha256()
    for variable in [*trained.variables, *trained.optimizer.variables]:
        digest.update(variable.numpy().tobytes())
    print(f"wait {stopping.wait} best {stopping.best!r} lr wait {slower.wait}")
    print(f"last {history.history['loss'][-1:]!r} {history.history['mae'][-1:]!r}")
    print(f"digest {digest.hexdigest()}")


if __name__ == "__main__":
    main()
