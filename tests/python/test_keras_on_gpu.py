"""Keras and TensorFlow with values on a GPU, up to where a real one begins."""

from __future__ import annotations

import ctypes
from pathlib import Path

import tensorflow as tf

from script import run_script
from stillframe._keras.dlpack import memory_of

# By scripts/setup. The installed package may be one without GPU kernels.
_BUILD = Path(__file__).resolve().parents[2] / "build/dev"


def test_values_of_gpus_are_saved_by_their_lane_and_the_hosts_at_once(tmp_path: Path) -> None:
    driver = _BUILD / "simulated_cuda/libcuda.so.1"
    assert driver.exists(), "scripts/setup builds the simulated driver"
    run_script(
        "keras_on_gpu.py",
        tmp_path,
        STILLFRAME_LIBRARY=str(_BUILD / "libstillframe.so"),
        STILLFRAME_DAEMON=str(_BUILD / "stillframed"),
        LD_LIBRARY_PATH=str(driver.parent),
    )


def test_the_capsule_of_a_tensor_says_where_its_memory_lies() -> None:
    tensor = tf.constant([1.0, 2.0, 3.0])
    capsule = tf.experimental.dlpack.to_dlpack(tensor)
    address, device = memory_of(capsule)
    assert device is None
    assert list((ctypes.c_float * 3).from_address(address)) == [1.0, 2.0, 3.0]
