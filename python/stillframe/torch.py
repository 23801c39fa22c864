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

from stillframe._core.report import Report, SaveRecord
from stillframe._core.ticket import Ticket
from stillframe._loader.resumable_loader import ResumableLoader
from stillframe._torch.checkpointer import Checkpointer
from stillframe._torch.file import load, save, verify
from stillframe._torch.members import Stateful
from stillframe._torch.model_load import load_model
from stillframe._torch.model_save import save_model
from stillframe._torch.restore import Restored
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
