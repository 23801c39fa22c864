"""fit() on two CPU devices by a MirroredStrategy, interrupted and resumed.

python keras_mirrored.py DIRECTORY

Fails if the resumed training ends with other bits than a whole one, if a replica has other values
than the first, or if the model that was kept loads with others.
"""

from __future__ import annotations

import hashlib
import os
import sys
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf

import stillframe.keras

_CPU = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(_CPU, [tf.config.LogicalDeviceConfiguration()] * 2)

_STRATEGY = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def model() -> Any:
    """The same at each call."""
    keras.utils.set_random_seed(4)
    with _STRATEGY.scope():
        made = keras.Sequential(
            [keras.layers.Input((6,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)]
        )
        made.compile("adam", "mse", metrics=["mae"])
    return made


def data() -> Any:
    """The same at each call, in an order of its own in each epoch."""
    x = np.random.RandomState(0).rand(64, 6).astype("float32")
    made = tf.data.Dataset.from_tensor_slices((x, x.sum(axis=1, keepdims=True)))
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return made.shuffle(64, seed=5).batch(8).with_options(options)


def digest(trained: Any) -> str:
    """Of every bit of weights and optimizer."""
    state = [*trained.variables, *trained.optimizer.variables]
    return hashlib.sha256(b"".join(np.asarray(one.numpy()).tobytes() for one in state)).hexdigest()


class Interrupt(keras.callbacks.Callback):  # type: ignore[misc]
    """Ends the training in the middle of the second epoch."""

    count = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Count."""
        self.count += 1
        if self.count == 11:
            raise KeyboardInterrupt


def main() -> None:
    """See the module."""
    directory = sys.argv[1]
    whole = model()
    whole.fit(data(), epochs=4, verbose=0)

    backup = stillframe.keras.BackupAndRestore(f"{directory}/backup", save_freq=5)
    try:
        model().fit(data(), epochs=4, verbose=0, callbacks=[backup, Interrupt()])
    except KeyboardInterrupt:
        del backup
    resumed = model()
    backup = stillframe.keras.BackupAndRestore(f"{directory}/backup", save_freq=5)
    resumed.fit(data(), epochs=4, verbose=0, callbacks=[backup])
    assert digest(resumed) == digest(whole)
    for variable in [*resumed.variables, *resumed.optimizer.variables]:
        first, *others = _STRATEGY.experimental_local_results(variable.value)
        assert len(others) == 1
        assert all(np.array_equal(first.numpy(), one.numpy()) for one in others), variable.path

    best = stillframe.keras.ModelCheckpoint(f"{directory}/best/{{epoch}}.keras", monitor="loss")
    resumed.fit(data(), epochs=1, verbose=0, callbacks=[best])
    with _STRATEGY.scope():
        assert digest(stillframe.keras.load_model(f"{directory}/best@latest")) == digest(resumed)


if __name__ == "__main__":
    main()
