"""Stillframe for PyTorch.

import stillframe.torch as stillframe

checkpointer = stillframe.Checkpointer(
    "checkpoints/run1", model=model, optimizer=optimizer, every_steps=50
)
restored = checkpointer.resume()
for step in range(restored.step + 1 if restored else 0, steps):
    train_step(...)
    checkpointer.step(step, metrics={"loss": loss})
checkpointer.close()
"""

from stillframe._checkpointer import Checkpointer
from stillframe._file import load, save, verify
from stillframe._loader import ResumableLoader
from stillframe._members import Stateful
from stillframe._model_load import load_model
from stillframe._model_save import save_model
from stillframe._report import Report, SaveRecord
from stillframe._restore import Restored
from stillframe.errors import (
    Cancelled,
    DataLoss,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    StillframeError,
    StillframeWarning,
    Unavailable,
)
from stillframe.ticket import Ticket

__all__ = [
    "Cancelled",
    "Checkpointer",
    "DataLoss",
    "Internal",
    "InvalidArgument",
    "NotFound",
    "Report",
    "ResourceExhausted",
    "Restored",
    "ResumableLoader",
    "SaveRecord",
    "Stateful",
    "StillframeError",
    "StillframeWarning",
    "Ticket",
    "Unavailable",
    "load",
    "load_model",
    "save",
    "save_model",
    "verify",
]
