"""The plain arguments of a Checkpointer, checked."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Literal

import torch

from stillframe._core.arguments import check_choice
from stillframe._core.best import Criterion
from stillframe._core.saver import SaverOptions
from stillframe._core.session import AttachOptions
from stillframe.errors import InvalidArgument


def attach_options(
    directory: str | os.PathLike[str],
    *,
    criteria: Sequence[Criterion],
    keep_last: int | None,
    keep_every: int | None,
    rank: int,
    world_size: int,
    arena_bytes_max: int | None,
    force_filesystem: bool,
    lane: str,
    gpu_ring_bytes: int | None,
) -> AttachOptions:
    """What the daemon is told; see Checkpointer for the arguments.

    Raises:
        InvalidArgument: one is wrong.
    """
    if keep_last is not None and keep_last < 1:
        raise InvalidArgument(f"keep_last is {keep_last}; it must be 1 or more, or None for all")
    if keep_every is not None and (type(keep_every) is not int or not 1 <= keep_every < 2**32):
        raise InvalidArgument(f"keep_every is {keep_every!r}; it must be an integer of 1 or more")
    if (rank, world_size) != (0, 1):
        raise InvalidArgument(
            f"rank {rank} of {world_size}: this version serves one rank; let rank 0 alone save"
        )
    check_choice("lane", lane, ("auto", "pinned", "hbm", "ipc"))
    if gpu_ring_bytes is not None and (type(gpu_ring_bytes) is not int or gpu_ring_bytes < 0):
        raise InvalidArgument(
            f"gpu_ring_bytes is {gpu_ring_bytes!r}; it must be an integer of 0 or more"
        )
    path = os.path.abspath(os.fspath(directory))
    if "\0" in path:
        raise InvalidArgument(f"{path!r}: the directory must not have a NUL in it")
    return AttachOptions(
        directory=path,
        rank=rank,
        world_size=world_size,
        keep_last=keep_last or 0,
        keep_every=keep_every or 0,
        best=[(one.metric, one.mode, one.count) for one in criteria],
        force_filesystem=force_filesystem,
        arena_bytes_max=arena_bytes_max or 0,
        framework=f"torch {torch.__version__}",
        python_version=platform.python_version(),
        lane=lane,
        # The library takes 0 for as many as are of use, and any few for none.
        gpu_ring_bytes=0 if gpu_ring_bytes is None else max(gpu_ring_bytes, 1),
    )


def saver_options(
    *,
    when_busy: Literal["wait", "skip"] | None,
    busy_timeout: float,
    check: Literal["sample", "full"],
    on_error: Literal["warn", "raise"],
) -> SaverOptions:
    """How saves are made; see Checkpointer for the arguments.

    Raises:
        InvalidArgument: one is wrong.
    """
    if when_busy is not None:
        check_choice("when_busy", when_busy, ("wait", "skip"))
    check_choice("check", check, ("sample", "full"))
    check_choice("on_error", on_error, ("warn", "raise"))
    if not 0 < busy_timeout <= 86_400:
        raise InvalidArgument(f"busy_timeout is {busy_timeout}, not 0 to 86400 seconds")
    return SaverOptions(
        when_busy=when_busy or "wait",
        busy_timeout=busy_timeout,
        checks_all=check == "full",
        on_error=on_error,
    )
