"""Stillframe for TensorFlow training loops, with the shapes of tf.train.

import stillframe.tensorflow as stillframe

checkpoint = stillframe.Checkpoint(model=model, optimizer=optimizer, step=step)
manager = stillframe.CheckpointManager(checkpoint, "runs/digits", max_to_keep=3)
manager.restore_or_initialize()
"""

from stillframe._core.ticket import Ticket
from stillframe._tensorflow.checkpoint import (
    Checkpoint,
    SavePath,
    latest_checkpoint,
    write_tf_checkpoint,
)
from stillframe._tensorflow.manager import CheckpointManager
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
    "Checkpoint",
    "CheckpointManager",
    "DataLoss",
    "Internal",
    "InvalidArgument",
    "NotFound",
    "ResourceExhausted",
    "SavePath",
    "StillframeError",
    "StillframeWarning",
    "Ticket",
    "Unavailable",
    "latest_checkpoint",
    "write_tf_checkpoint",
]
