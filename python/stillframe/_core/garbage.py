"""The garbage collector, where it finds nothing."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Hold automatic collections back, in all threads, if there are any.

    To make objects by the ten thousand sets them off again and again, and each looks at all that
    live.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
