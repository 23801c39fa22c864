"""The random number generators that a fit() draws from and that no variable of the model holds.

On Keras's torch backend torch's own is one of them: it shuffles the data.
"""

from __future__ import annotations

import random
from typing import Any

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR

from stillframe.errors import DataLoss


def get_rng() -> dict[str, Any]:
    """The states of Python's, NumPy's and Keras's own generator, as plain values."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
    }
    generator = global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)
    if generator is not None:
        state["keras"] = np.array(keras.ops.convert_to_numpy(generator.state.value))
    if keras.backend.backend() == "torch":
        import torch

        state["torch"] = torch.get_rng_state().numpy()
    return state


def set_rng(state: dict[str, Any]) -> None:
    """Set them to what get_rng() gave.

    Raises:
        DataLoss: it did not.
    """
    try:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        if "keras" in state:
            keras.src.random.seed_generator.global_seed_generator().state.assign(state["keras"])
        if "torch" in state and keras.backend.backend() == "torch":
            import torch

            torch.set_rng_state(torch.from_numpy(state["torch"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataLoss(f"state.json: rng cannot be restored: {error}") from error
