"""fit() and a loop of TensorFlow whose values of floats lie on GPU 0 of the simulated driver.

python keras_on_gpu.py DIRECTORY

TensorFlow for the CPU has no tensor on a GPU, so each value that is taken for a save is copied to
memory of the simulated driver and handed over as the DLPack capsule that TensorFlow would make of
it. All behind that is real: the lane, the daemon, the files. Fails if a save did not take the lane
of GPUs, or if what is loaded has other bits than what was saved.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf

import stillframe.keras
import stillframe.tensorflow
from stillframe._keras import dlpack, values

_KEPT: list[Any] = []  # What the capsules refer to, for as long as this process lives.


def driver() -> ctypes.CDLL:
    """The simulated one, with the context of its first GPU current."""
    loaded = ctypes.CDLL("libcuda.so.1")
    context = ctypes.c_void_p()
    assert loaded.cuInit(0) == 0
    assert loaded.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
    assert loaded.cuCtxPushCurrent_v2(context) == 0
    return loaded


DRIVER = driver()


def capsule_on_gpu(tensor: Any) -> Any:
    """A copy of the tensor in the GPU's memory."""
    value = np.ascontiguousarray(np.asarray(memoryview(tensor)))
    address = ctypes.c_uint64()
    # At an offset, as of a tensor inside of an allocation.
    assert DRIVER.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(value.nbytes + 512)) == 0
    offset = 256
    assert (
        DRIVER.cuMemcpyHtoDAsync_v2(
            ctypes.c_uint64(address.value + offset),
            ctypes.c_void_p(value.ctypes.data),
            ctypes.c_size_t(value.nbytes),
            None,
        )
        == 0
    )
    assert DRIVER.cuCtxSynchronize() == 0
    described = dlpack._Tensor(data=address.value, byte_offset=offset)
    described.device.type = 2
    make = ctypes.pythonapi.PyCapsule_New
    make.restype = ctypes.py_object
    make.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    made = make(ctypes.addressof(described), b"dltensor", None)
    _KEPT.extend([described, made])
    return made


def is_on_gpu(tensor: Any) -> bool:
    """Integers stay on the host, as TensorFlow has int32 there whatever its device is called."""
    return not tensor.dtype.is_integer


class Lanes(logging.Handler):
    """The lanes that the saves' INFO lines tell."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Take one line."""
        self.seen |= {one for one in record.getMessage().split() if one.startswith("lane=")}


def fit(directory: str) -> None:
    """Two epochs, each saved; the newest loads to the same bits, also as a whole model."""
    keras.utils.set_random_seed(4)
    layers = [keras.layers.Dense(300, "relu"), keras.layers.Dropout(0.5), keras.layers.Dense(1)]
    model = keras.Sequential([keras.layers.Input((6,)), *layers])
    model.compile("adam", "mse")
    x = np.random.RandomState(0).rand(64, 6).astype("float32")
    saver = stillframe.keras.ModelCheckpoint(os.path.join(directory, "epoch-{epoch}.keras"))
    model.fit(x, x.sum(axis=1), epochs=2, verbose=0, callbacks=[saver])
    stillframe.keras.save_model(model, f"{directory}-whole")
    for name in (f"{directory}@latest", f"{directory}-whole"):
        again = stillframe.keras.load_model(name)
        pairs = zip(model.variables, again.variables, strict=True)
        assert all(np.array_equal(one, other) for one, other in pairs), name
        pairs = zip(model.optimizer.variables, again.optimizer.variables, strict=True)
        assert all(np.array_equal(one, other) for one, other in pairs), name


def loop(directory: str) -> None:
    """Variables of each kind, changed as soon as save() has returned."""
    values = {
        "floats": np.arange(1_000_003, dtype="float32"),
        "halves": np.arange(5, dtype="float16"),
        "flags": np.array([True, False, True]),
        "count": np.array(7, dtype="int64"),
        "none": np.zeros((0, 3), dtype="float32"),
    }
    variables = {name: tf.Variable(value) for name, value in values.items()}
    checkpoint = stillframe.tensorflow.Checkpoint(**variables)
    path = checkpoint.save(os.path.join(directory, "ckpt"))
    for one in variables.values():
        one.assign(tf.zeros_like(one))
    checkpoint.restore(path).assert_consumed()
    for name, value in values.items():
        assert np.array_equal(variables[name].numpy(), value), name


if __name__ == "__main__":
    lanes = Lanes()
    logging.getLogger("stillframe").addHandler(lanes)
    logging.getLogger("stillframe").setLevel(logging.INFO)
    values.is_on_gpu = is_on_gpu
    values.tf_capsule = capsule_on_gpu
    fit(os.path.join(sys.argv[1], "fit"))
    loop(os.path.join(sys.argv[1], "loop"))
    assert lanes.seen == {"lane=pinned"}, lanes.seen
