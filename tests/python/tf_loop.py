"""A training loop of plain TensorFlow: trains to a step, and saves every third.

python tf_loop.py RUN STEPS [KILL_AT]

Prints a hash of all state at the end, and what it began from. Kills itself with SIGKILL after the
step KILL_AT.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

import stillframe.tensorflow as stillframe


class Net(tf.Module):  # type: ignore[misc]
    """Two layers, a moving average beside them, and dropout by a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        start = tf.random.Generator.from_seed(3)
        self.layers = [
            {
                "w": tf.Variable(start.normal((12, 32))),
                "b": tf.Variable(tf.zeros(32)),
            },
            {
                "w": tf.Variable(start.normal((32, 4))),
                "b": tf.Variable(tf.zeros(4)),
            },
        ]
        self.average = tf.Variable(tf.zeros(32), trainable=False)
        self.draws = tf.random.Generator.from_seed(5)

    def __call__(self, x: Any) -> Any:
        """The logits."""
        hidden = tf.nn.relu(x @ self.layers[0]["w"] + self.layers[0]["b"])
        self.average.assign(0.9 * self.average + 0.1 * tf.reduce_mean(hidden, axis=0))
        kept = tf.cast(self.draws.uniform(tf.shape(hidden)) > 0.2, tf.float32)
        return (hidden * kept) @ self.layers[1]["w"] + self.layers[1]["b"]


class Training:
    """Model, optimizer and position."""

    def __init__(self, capture: Any = "eager") -> None:
        import keras

        self.net = Net()
        self.optimizer = keras.optimizers.Adam(0.01)
        self.step = tf.Variable(0, dtype=tf.int64)
        self.is_warm = tf.Variable(False)
        self.checkpoint = stillframe.Checkpoint(
            net=self.net,
            optimizer=self.optimizer,
            step=self.step,
            is_warm=self.is_warm,
            capture=capture,
        )

    def train(self) -> float:
        """One step on the batch that belongs to it."""
        data = tf.random.stateless_normal((16, 12), seed=[int(self.step), 1])
        labels = tf.cast(tf.reduce_sum(data[:, :4], axis=1) > 0, tf.int32)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(labels, self.net(data))
            )
        variables = self.net.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        self.step.assign_add(1)
        self.is_warm.assign(True)
        return float(loss)

    def digest(self) -> str:
        """Of every bit of the state."""
        state = [*self.net.variables, self.net.draws.state, self.step, self.is_warm]
        state += [one.value for one in self.optimizer.variables]
        return hashlib.sha256(b"".join(one.numpy().tobytes() for one in state)).hexdigest()


def main() -> None:
    """See the module."""
    run, steps = sys.argv[1], int(sys.argv[2])
    kill_at = int(sys.argv[3]) if len(sys.argv) > 3 else -1
    training = Training()
    manager = stillframe.CheckpointManager(
        training.checkpoint, run, max_to_keep=2, step_counter=training.step, checkpoint_interval=3
    )
    restored = manager.restore_or_initialize()
    print("from", int(training.step), os.path.basename(restored or "nothing"), flush=True)
    while int(training.step) < steps:
        loss = training.train()
        path = manager.save(metrics={"loss": loss})
        if path is not None and int(training.step) <= kill_at:
            path.ticket.wait(timeout=60)
        if int(training.step) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    manager.close()
    print("digest", training.digest())


if __name__ == "__main__":
    main()
