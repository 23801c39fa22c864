"""A bar for what takes long, where somebody sees it: on a terminal, and with tqdm installed."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

# A bar for less would be gone before it is seen: 1 GiB is a second or so.
_BYTES_MIN = 2**30


@contextlib.contextmanager
def byte_bar(what: str, total_bytes: int) -> Iterator[Callable[[int], object] | None]:
    """Yield what takes the bytes done since its last call; None where no bar is shown."""
    make = _tqdm() if total_bytes >= _BYTES_MIN and _is_terminal() else None
    if make is None:
        yield None
        return
    with make(
        desc=f"stillframe: {what}",
        total=total_bytes,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        leave=False,
    ) as bar:
        yield bar.update


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _tqdm() -> Callable[..., Any] | None:
    try:
        module = importlib.import_module("tqdm")
    except ImportError:
        return None
    make: Callable[..., Any] = module.tqdm
    return make
