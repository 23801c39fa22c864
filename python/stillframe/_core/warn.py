"""How the package speaks to its user: the logger, and warnings that point at the user's line."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from types import FrameType

import stillframe
from stillframe.errors import StillframeWarning

log = logging.getLogger("stillframe")
# Who sets up no logging is told by the warning; twice would be once too often.
log.addHandler(logging.NullHandler())


def warn(text: str) -> None:
    """Log and warn, with the line of the user's code that called into the package."""
    log.warning("%s", text)
    package = os.path.join(os.path.dirname(stillframe.__file__), "")
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_code.co_filename.startswith(package):
        frame = frame.f_back
        level += 1
    warnings.warn(text, StillframeWarning, stacklevel=level)
