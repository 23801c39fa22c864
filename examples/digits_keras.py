"""Trains a Keras classifier of handwritten digits that may be killed at any instant and goes on.

    python examples/digits_keras.py checkpoints/keras       # again after a kill: it resumes
    python examples/digits_keras.py --no-checkpoints        # the same training, uninterrupted

Dropout and the shuffled order of the data draw random numbers, Adam has state: all of it must come
back for the result to be the same, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import stillframe.keras


def main() -> None:
    """Train to the end, from wherever the last process came to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", default="checkpoints/keras")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--no-checkpoints", action="store_true")
    arguments = parser.parse_args()

    keras.utils.set_random_seed(0)
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype("float32")
    labels = digits.target
    batches = tf.data.Dataset.from_tensor_slices((images[:1437], labels[:1437]))
    batches = batches.shuffle(1437, seed=1, reshuffle_each_iteration=True).batch(32)
    unseen = (images[1437:], labels[1437:])

    model = keras.Sequential(
        [
            keras.layers.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(arguments.width, activation="relu"),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])

    callbacks: list[keras.callbacks.Callback] = [Progress()]
    if not arguments.no_checkpoints:
        callbacks += [
            stillframe.keras.BackupAndRestore(f"{arguments.directory}/backup", save_freq=10),
            stillframe.keras.ModelCheckpoint(
                f"{arguments.directory}/best/{{epoch:02d}}.keras",
                monitor="val_loss",
                save_best_only=True,
                keep_last=3,
            ),
        ]
    history = model.fit(
        batches,
        epochs=arguments.epochs,
        validation_data=unseen,
        callbacks=callbacks,
        shuffle=False,  # The dataset does it.
        verbose=0,
    )
    state = [*model.variables, *model.optimizer.variables]
    digest = hashlib.sha256(b"".join(np.asarray(one).tobytes() for one in state)).hexdigest()
    print("end", json.dumps({"digest": digest, "last": last_of(history)}), flush=True)


def last_of(history: Any) -> dict[str, str]:
    """The last epoch's metrics, to the bit."""
    return {name: float(values[-1]).hex() for name, values in history.history.items() if values}


class Progress(keras.callbacks.Callback):  # type: ignore[misc]
    """Says each batch that was trained."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Note the epoch."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Say it."""
        print(f"batch {self._epoch} {batch}", flush=True)


if __name__ == "__main__":
    main()
