"""Stillframe for Keras 3.

import stillframe.keras

model.fit(..., callbacks=[stillframe.keras.ModelCheckpoint("runs/digits/{epoch:02d}.keras")])
"""

from stillframe._core.ticket import Ticket
from stillframe._keras.backup import BackupAndRestore
from stillframe._keras.checkpoint import ModelCheckpoint
from stillframe._keras.models import load_model, load_weights, save_model
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
    "BackupAndRestore",
    "Cancelled",
    "DataLoss",
    "Internal",
    "InvalidArgument",
    "ModelCheckpoint",
    "NotFound",
    "ResourceExhausted",
    "StillframeError",
    "StillframeWarning",
    "Ticket",
    "Unavailable",
    "load_model",
    "load_weights",
    "save_model",
]
