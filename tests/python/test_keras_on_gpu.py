"""Keras and TensorFlow with values on a GPU, up to where a real one begins."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

from stillframe._dlpack import memory_of

_ROOT = Path(__file__).resolve().parents[2]


def test_values_of_gpus_are_saved_by_their_lane_and_the_hosts_at_once(tmp_path: Path) -> None:
    built = os.environ.get("STILLFRAME_LIBRARY", str(_ROOT / "build/dev/libstillframe.so"))
    folder = Path(built).parent
    driver = folder / "simulated_cuda/libcuda.so.1"
    if not driver.exists():
        pytest.skip("no simulated driver was built")
    script = Path(__file__).with_name("keras_on_gpu.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={
            **os.environ,
            "STILLFRAME_LIBRARY": built,
            "STILLFRAME_DAEMON": str(folder / "stillframed"),
            "LD_LIBRARY_PATH": str(driver.parent),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_capsule_of_a_tensor_says_where_its_memory_lies() -> None:
    tensor = tf.constant([1.0, 2.0, 3.0])
    capsule = tf.experimental.dlpack.to_dlpack(tensor)
    address, device = memory_of(capsule)
    assert device is None
    assert list((ctypes.c_float * 3).from_address(address)) == [1.0, 2.0, 3.0]
