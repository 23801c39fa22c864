"""stillframe.tensorflow: tf.train's shapes over the daemon, with TensorFlow itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import keras
import tensorflow as tf

import stillframe.tensorflow as stillframe
from command import ok
from tf_loop import Training

_LOOP = Path(__file__).with_name("tf_loop.py")


def _loop(run: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(_LOOP), str(run), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


def _trained(steps: int = 2, **options: Any) -> Training:
    training = Training(**options)
    for _ in range(steps):
        training.train()
    return training


# --- Resume ---------------------------------------------------------------------------------------


def test_a_loop_that_is_killed_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = _loop(tmp_path / "whole", 11)
    assert whole.returncode == 0, whole.stderr
    killed = _loop(tmp_path / "run", 11, 8)
    assert killed.returncode == -9, killed.stderr
    resumed = _loop(tmp_path / "run", 11)
    assert resumed.returncode == 0, resumed.stderr
    # Saved at steps 1, 4 and 7; killed after 8.
    assert resumed.stdout.splitlines()[0] == "from 7 00000003-step-7"
    assert resumed.stdout.splitlines()[-1] == whole.stdout.splitlines()[-1]


def test_variables_that_do_not_exist_yet_get_their_values_when_they_are_made(
    tmp_path: Path,
) -> None:
    saved = _trained()
    path = saved.checkpoint.save(f"{tmp_path}/ckpt")
    saved.checkpoint.close()
    fresh = Training()
    status = fresh.checkpoint.restore(path)
    status.assert_existing_objects_matched()
    assert int(fresh.step) == 2
    fresh.train()
    saved.train()
    assert fresh.digest() == saved.digest()
    status.assert_consumed()


def test_where_everything_exists_all_is_consumed(tmp_path: Path) -> None:
    saved = _trained(3)
    path = saved.checkpoint.save(f"{tmp_path}/ckpt")
    other = _trained(1)
    path.ticket.wait(timeout=60)
    other.checkpoint.restore(path).assert_consumed().expect_partial()
    assert other.digest() == saved.digest()
    assert int(other.checkpoint.save_counter) == 1
    saved.checkpoint.close()


def test_no_path_restores_nothing(tmp_path: Path) -> None:
    training = _trained(1)
    before = training.digest()
    training.checkpoint.restore(stillframe.latest_checkpoint(tmp_path)).assert_consumed()
    assert training.digest() == before


# --- The manager ----------------------------------------------------------------------------------


def test_a_manager_keeps_the_newest_and_the_best_and_lists_them(tmp_path: Path) -> None:
    step = tf.Variable(0, dtype=tf.int64)
    checkpoint = stillframe.Checkpoint(step=step)
    manager = stillframe.CheckpointManager(
        checkpoint, tmp_path / "run", max_to_keep=2, best=("loss", "min", 1)
    )
    assert manager.latest_checkpoint is None
    for loss in (0.5, 0.1, 0.9, 0.8, 0.7):
        step.assign_add(1)
        manager.save(metrics={"loss": loss})
    wanted = ["00000002-step-2", "00000004-step-4", "00000005-step-5"]
    # Retention comes behind DURABLE, beside us.
    deadline = time.monotonic() + 10
    while True:
        names = [os.path.basename(path) for path in manager.checkpoints]
        if names == wanted or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    assert names == wanted
    assert manager.latest_checkpoint == f"{tmp_path}/run/00000005-step-5"
    manager.close()
    assert stillframe.latest_checkpoint(tmp_path / "run") == f"{tmp_path}/run/00000005-step-5"
    checkpoint.restore(f"{tmp_path}/run@best")
    assert int(step) == 2


def test_a_manager_saves_no_sooner_than_its_interval_unless_told(tmp_path: Path) -> None:
    step = tf.Variable(0, dtype=tf.int64)
    manager = stillframe.CheckpointManager(
        stillframe.Checkpoint(step=step),
        tmp_path / "run",
        max_to_keep=None,
        step_counter=step,
        checkpoint_interval=10,
    )
    saved = []
    for _ in range(25):
        saved.append(manager.save() is not None)
        step.assign_add(1)
    assert [index for index, is_saved in enumerate(saved) if is_saved] == [0, 10, 20]
    path = manager.save(check_interval=False)
    assert path is not None
    assert path.endswith("-step-25")
    manager.close()


def test_a_manager_without_a_checkpoint_initialises(tmp_path: Path) -> None:
    called = []
    manager = stillframe.CheckpointManager(
        stillframe.Checkpoint(step=tf.Variable(1)),
        tmp_path / "run",
        max_to_keep=1,
        init_fn=lambda: called.append(True),
    )
    assert manager.restore_or_initialize() is None
    assert called == [True]
    manager.close()


def test_a_damaged_newest_checkpoint_is_passed_over_loudly(tmp_path: Path) -> None:
    value = tf.Variable(np.zeros(5000, np.float32))
    checkpoint = stillframe.Checkpoint(value=value)
    manager = stillframe.CheckpointManager(checkpoint, tmp_path / "run", max_to_keep=3)
    for number in (1.0, 2.0):
        value.assign(np.full(5000, number, np.float32))
        manager.save()
    manager.close()
    part = tmp_path / "run" / "00000002-step-2" / "model.safetensors"
    raw = bytearray(part.read_bytes())
    raw[-3] ^= 1
    part.write_bytes(raw)
    manager = stillframe.CheckpointManager(checkpoint, tmp_path / "run", max_to_keep=3)
    with pytest.warns(stillframe.StillframeWarning, match="00000001-step-1 was restored instead"):
        manager.restore_or_initialize()
    assert float(value[0]) == 1.0
    manager.close()


# --- Capture --------------------------------------------------------------------------------------


@pytest.mark.parametrize("capture", ["eager", "lazy"])
def test_what_training_writes_during_the_capture_is_not_in_the_checkpoint(
    capture: str, tmp_path: Path
) -> None:
    size = 24 << 20
    big = tf.Variable(tf.zeros(size, tf.uint8))
    count = tf.Variable(0, dtype=tf.int32)
    flag = tf.Variable(True)
    half = tf.Variable(tf.zeros(size // 4, tf.bfloat16))
    options: dict[str, Any] = {"capture": capture}
    checkpoint = stillframe.Checkpoint(big=big, count=count, flag=flag, half=half, **options)
    path = checkpoint.save(f"{tmp_path}/run/ckpt")
    for _ in range(5):
        big.assign_add(tf.ones(size, tf.uint8))
        half.assign_add(tf.ones(size // 4, tf.bfloat16))
        count.assign_add(1)
        flag.assign(False)
    path.ticket.wait(timeout=60)
    checkpoint.close()
    checkpoint.restore(path).assert_consumed()
    assert not np.any(big.numpy())
    assert not np.any(half.numpy())
    assert int(count) == 0
    assert bool(flag)


# --- Formats --------------------------------------------------------------------------------------


def test_the_plain_safetensors_library_opens_the_variables_by_tensorflows_names(
    tmp_path: Path,
) -> None:
    training = _trained(1)
    path = training.checkpoint.save(f"{tmp_path}/run/ckpt")
    training.checkpoint.close()
    tensors = load_file(Path(path) / "model.safetensors")
    assert np.array_equal(tensors["net/layers/0/w"], training.net.layers[0]["w"].numpy())
    assert {"step", "save_counter", "is_warm", "net/draws/_state_var"} <= tensors.keys()
    shown = ok("ls", tmp_path / "run")
    assert len(shown["checkpoints"]) == 1
    ok("verify", tmp_path / "run")


def test_a_checkpoint_of_tf_train_is_taken_over_and_can_be_written_again(tmp_path: Path) -> None:
    training = _trained(2)
    root = tf.train.Checkpoint(
        net=training.net,
        optimizer=training.optimizer,
        step=training.step,
        is_warm=training.is_warm,
    )
    stock = root.save(f"{tmp_path}/stock/ckpt")
    digest = training.digest()

    taken = Training()
    taken.checkpoint.restore(stock)
    assert int(taken.step) == 2
    taken.train()
    training.train()
    assert taken.digest() == training.digest()

    training.checkpoint.restore(stock).assert_consumed()
    assert training.digest() == digest
    path = training.checkpoint.save(f"{tmp_path}/run/ckpt")
    training.checkpoint.close()
    stillframe.write_tf_checkpoint(path, f"{tmp_path}/again/ckpt")
    training.train()
    root.read(f"{tmp_path}/again/ckpt").assert_consumed()
    assert training.digest() == digest


def test_a_keras_model_is_one_of_the_trackables(tmp_path: Path) -> None:
    def make() -> Any:
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(3)])
        model.compile("adam", "mse")
        model.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0)
        return model

    model = make()
    checkpoint = stillframe.Checkpoint(model=model, optimizer=model.optimizer)
    path = checkpoint.save(f"{tmp_path}/run/ckpt")
    checkpoint.close()
    expected = [value.copy() for value in model.get_weights()]
    model.set_weights([np.zeros_like(value) for value in expected])
    checkpoint.restore(path).assert_consumed()
    assert all(map(np.array_equal, model.get_weights(), expected))


# --- Several devices ------------------------------------------------------------------------------


@pytest.mark.parametrize("has_more", [False, True], ids=["all", "some"])
def test_a_normalization_layer_computes_with_the_statistics_of_the_checkpoint(
    tmp_path: Path, has_more: bool
) -> None:
    def make() -> keras.Model:
        layers = [keras.layers.Input((2,)), keras.layers.Normalization(), keras.layers.Dense(2)]
        return keras.Sequential(layers)

    saved = make()
    saved.layers[0].adapt(np.arange(20.0).reshape(10, 2))
    # With another variable it is TensorFlow that assigns.
    more = {"step": tf.Variable(1)} if has_more else {}
    checkpoint = stillframe.Checkpoint(model=saved, **more)
    path = checkpoint.save(f"{tmp_path}/ckpt")
    checkpoint.close()
    model = make()
    stillframe.Checkpoint(model=model).restore(path).expect_partial()
    inputs = np.ones((3, 2))
    np.testing.assert_array_equal(model(inputs), saved(inputs))


def test_a_mirrored_loop_saves_once_and_restores_on_every_replica(tmp_path: Path) -> None:
    script = f"""
import os
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import stillframe.tensorflow as stillframe
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
with strategy.scope():
    w = tf.Variable(tf.ones((64, 64)))
    seen = tf.Variable(
        0.0,
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.SUM,
    )

@tf.function
def train():
    def replica():
        context = tf.distribute.get_replica_context()
        index = tf.cast(context.replica_id_in_sync_group, tf.float32)
        seen.assign_add(1.0 + index)
    strategy.run(replica)

train()
w.assign(tf.ones((64, 64)) * 3.0)
checkpoint = stillframe.Checkpoint(w=w, seen=seen)
path = checkpoint.save({str(tmp_path)!r} + "/run/ckpt")
w.assign(tf.zeros((64, 64)))
train()
assert float(seen.read_value()) == 6.0
checkpoint.restore(path).assert_consumed()
for one in strategy.experimental_local_results(w):
    assert float(tf.reduce_sum(one)) == 3.0 * 64 * 64, one
assert float(seen.read_value()) == 3.0
checkpoint.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    tensors = load_file(tmp_path / "run" / "00000001-step-1" / "model.safetensors")
    assert tensors["w"].shape == (64, 64)
    assert float(tensors["seen"]) == 3.0


# --- Bad input ------------------------------------------------------------------------------------


def test_what_is_no_variable_of_numbers_is_refused_and_all_of_it_named(tmp_path: Path) -> None:
    table = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)
    checkpoint = stillframe.Checkpoint(
        words=tf.Variable("text"),
        data=iter(tf.data.Dataset.range(3)),
        table=table,
        fine=tf.Variable(1.0),
    )
    with pytest.raises(stillframe.InvalidArgument) as refused:
        checkpoint.save(f"{tmp_path}/run/ckpt")
    for name in ("words has dtype string", "data is a tensorflow", "table is a tensorflow"):
        assert name in str(refused.value)
    assert "fine" not in str(refused.value)
    checkpoint.close()
    assert stillframe.latest_checkpoint(tmp_path / "run") is None


def test_other_shapes_are_all_listed_and_nothing_is_assigned(tmp_path: Path) -> None:
    saved = stillframe.Checkpoint(
        a=tf.Variable(tf.ones(3)), b=tf.Variable(tf.ones(4)), c=tf.Variable(tf.ones(5))
    )
    path = saved.save(f"{tmp_path}/run/ckpt")
    saved.close()
    a, b = tf.Variable(tf.zeros(7)), tf.Variable(tf.zeros(4, tf.float64))
    c = tf.Variable(tf.zeros(5))
    other = stillframe.Checkpoint(a=a, b=b, c=c)
    with pytest.raises(stillframe.InvalidArgument) as refused:
        other.restore(path)
    assert "2 differences" in str(refused.value)
    assert "a is F32 [7], in the checkpoint F32 [3]" in str(refused.value)
    assert "b is F64 [4], in the checkpoint F32 [4]" in str(refused.value)
    assert not np.any(c.numpy())


def test_renamed_variables_are_found_by_assert_consumed(tmp_path: Path) -> None:
    saved = stillframe.Checkpoint(a=tf.Variable(1.0), b=tf.Variable(2.0))
    path = saved.save(f"{tmp_path}/run/ckpt")
    saved.close()
    a = tf.Variable(0.0)
    other = stillframe.Checkpoint(a=a, renamed=tf.Variable(0.0))
    status = other.restore(path)
    assert float(a) == 1.0
    with pytest.raises(AssertionError, match="b"):
        status.assert_consumed()
    with pytest.raises(AssertionError, match="renamed|matched"):
        status.assert_existing_objects_matched()
    status.expect_partial()


def test_a_checkpoint_of_pytorch_is_refused_with_its_origin(tmp_path: Path) -> None:
    from stillframe.torch import Checkpointer

    with Checkpointer(tmp_path / "run", model=torch.nn.Linear(2, 2)) as checkpointer:
        checkpointer.save(1)
    value = tf.Variable(0.0)
    with pytest.raises(stillframe.InvalidArgument, match="comes from torch"):
        stillframe.Checkpoint(value=value).restore(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_to_keep": 0}, "max_to_keep is 0"),
        ({"max_to_keep": 1, "checkpoint_interval": 3}, "needs a step_counter"),
        ({"max_to_keep": 1, "keep_checkpoint_every_n_hours": 2}, "is not offered"),
        ({"max_to_keep": 1, "best": ("loss", "least", 1)}, "least"),
    ],
)
def test_a_wrong_argument_of_the_manager_is_named(
    options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    checkpoint = stillframe.Checkpoint(value=tf.Variable(1.0))
    with pytest.raises(stillframe.InvalidArgument, match=reason):
        stillframe.CheckpointManager(checkpoint, tmp_path / "run", **options)


def test_a_second_manager_of_the_same_directory_is_refused(tmp_path: Path) -> None:
    checkpoint = stillframe.Checkpoint(value=tf.Variable(1.0))
    manager = stillframe.CheckpointManager(checkpoint, tmp_path / "run", max_to_keep=1)
    with pytest.raises(stillframe.InvalidArgument, match="already"):
        stillframe.CheckpointManager(checkpoint, tmp_path / "run", max_to_keep=1)
    manager.close()


def test_a_save_inside_a_tf_function_is_refused(tmp_path: Path) -> None:
    checkpoint = stillframe.Checkpoint(value=tf.Variable(1.0))
    manager = stillframe.CheckpointManager(checkpoint, tmp_path / "run", max_to_keep=1)

    @tf.function
    def step() -> None:
        manager.save(checkpoint_number=1)

    with pytest.raises(Exception, match="outside of tf.function"):
        step()
    manager.close()
