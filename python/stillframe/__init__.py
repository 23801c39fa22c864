"""Stillframe: checkpoints of a training process, taken beside it by a daemon.

This package holds what every framework shares: the version and the errors. PyTorch users write
`import stillframe.torch as stillframe`.
"""

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

__version__ = "0.1.0"

__all__ = [
    "Cancelled",
    "DataLoss",
    "Internal",
    "InvalidArgument",
    "NotFound",
    "ResourceExhausted",
    "StillframeError",
    "StillframeWarning",
    "Unavailable",
    "__version__",
]
