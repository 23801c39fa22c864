"""Errors: one class per code of the C library, each saying what the caller can do next.

A state that is not reached in time is Python's own TimeoutError.
"""

from __future__ import annotations


class StillframeError(Exception):
    """Root of the tree; catch it to catch all of them.

    Attributes:
        native: errno behind the error, or 0.
    """

    native: int = 0


class InvalidArgument(StillframeError, ValueError):
    """The request itself is wrong; retrying it cannot help."""


class NotFound(StillframeError, LookupError):
    """No such checkpoint, run or tag."""


class ResourceExhausted(StillframeError):
    """Out of disk, slots or memory; free something, then retry."""


class Unavailable(StillframeError):
    """The daemon or the drive may come back; retry with backoff."""


class DataLoss(StillframeError):
    """Bytes are missing or fail their checksum, or a capture was torn."""


class Cancelled(StillframeError):
    """Ended by close, or by the other side."""


class Internal(StillframeError):
    """A bug in Stillframe; please report it."""


class StillframeWarning(UserWarning):
    """Something went wrong that does not stop the training."""


_CLASSES: dict[int, type[StillframeError]] = {
    1: InvalidArgument,
    2: NotFound,
    3: ResourceExhausted,
    4: Unavailable,
    5: DataLoss,
    6: Cancelled,
    7: Internal,
}


def error_from_code(code: int, message: str, native: int = 0) -> StillframeError:
    """Make the error of an `enum sf_code`; a code that this version does not know is Internal."""
    kind = _CLASSES.get(code)
    error = kind(message) if kind else Internal(f"code {code}: {message}")
    error.native = native
    return error
