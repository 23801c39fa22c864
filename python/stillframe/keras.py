"""Stillframe for Keras 3.

import stillframe.keras

model.fit(..., callbacks=[stillframe.keras.ModelCheckpoint("runs/digits/{epoch:02d}.keras")])
"""

from stillframe._keras_backup import BackupAndRestore
from stillframe._keras_checkpoint import ModelCheckpoint
from stillframe._keras_models import load_model, load_weights, save_model
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
