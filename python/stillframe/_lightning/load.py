"""Loading what a stub names, or, for a name that means the newest state, what stands in for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillframe._core.saved import SavedCheckpoint
from stillframe._core.session import list_run
from stillframe._core.warn import warn
from stillframe._lightning.folder import save_id_of
from stillframe._lightning.stub import Stub
from stillframe._lightning.tree import unpack
from stillframe.errors import DataLoss, InvalidArgument, NotFound, StillframeError

MapLocation = Any


def load(
    path: Path,
    stub: Stub,
    settle: Callable[[], str | None],
    *,
    falls_back: bool,
    allow_pickle: bool,
) -> dict[str, Any]:
    """The checkpoint that a stub names.

    Args:
        path: of the stub, perhaps through a link.
        stub: what it says.
        settle: waits for saves that a killed training left captured; answers why it could not.
        falls_back: take the newest durable one, loudly, if this one is damaged or not durable.
        allow_pickle: load pickles.

    Raises:
        NotFound: it never became durable, and nothing may or can stand in for it.
        DataLoss: it is damaged, and nothing may or can stand in for it.
    """
    run = path.resolve().parent / stub.run
    try:
        found = _load_named(run, stub, allow_pickle)
        if found is None:
            reason = settle() or "its training ended before"
            found = _load_named(run, stub, allow_pickle)
        if found is not None:
            return found
        problem: StillframeError = NotFound(
            f"{path} names step {stub.step}, which is not durable: {reason}"
        )
    except DataLoss as error:
        problem = DataLoss(f"{path} names step {stub.step}, which is damaged: {error}")
    if not falls_back:
        raise _with_advice(problem, run)
    for entry in reversed(list_run(str(run))):
        try:
            if entry["damage"] is not None:
                raise DataLoss(entry["damage"])
            with SavedCheckpoint(str(run), str(entry["sequence"])) as saved:
                tree = unpack(saved, allow_pickle=allow_pickle)
        except DataLoss as error:
            warn(f"checkpoint {entry['sequence']} of {run} is damaged: {error}")
            continue
        warn(f"{problem}; loading step {entry['step']} instead, the newest durable one")
        return tree
    raise _with_advice(problem, run)


def load_directory(path: Path, *, allow_pickle: bool) -> dict[str, Any]:
    """The checkpoint in a directory of a run, such as stillframe-run/00000012-step-1200.

    Raises:
        InvalidArgument: the directory is something else.
        DataLoss: it is damaged.
    """
    if any((path / name).exists() for name in (".metadata", "meta.pt")):
        raise InvalidArgument(
            f"{path} is a sharded checkpoint: FSDPStrategy and ModelParallelStrategy write and "
            "load those past every CheckpointIO; load it with the one that wrote it"
        )
    sequence = path.name.partition("-step-")[0]
    if not (path / "manifest.json").exists() or not sequence.isdecimal():
        raise InvalidArgument(f"{path} is a directory, and no checkpoint of a run")
    with SavedCheckpoint(str(path.parent), str(int(sequence))) as saved:
        return unpack(saved, allow_pickle=allow_pickle)


def _load_named(run: Path, stub: Stub, allow_pickle: bool) -> dict[str, Any] | None:
    """None if there is no such checkpoint."""
    try:
        saved = SavedCheckpoint(str(run), str(stub.sequence))
    except NotFound:
        return None
    with saved:
        # Its sequence may have been given again.
        if save_id_of(saved) != stub.save_id:
            return None
        state = None if stub.state is None else json.loads(stub.state)
        return unpack(saved, state, allow_pickle=allow_pickle)


def _with_advice(problem: StillframeError, run: Path) -> StillframeError:
    intact = [entry for entry in list_run(str(run)) if entry["damage"] is None]
    advice = (
        f"the newest durable one is {intact[-1]['path']}: give that directory as the path"
        if intact
        else "the run has no durable one: remove the file to begin anew"
    )
    return type(problem)(f"{problem}; {advice}")


def move(tree: dict[str, Any], map_location: MapLocation) -> dict[str, Any]:
    """The tree with its CPU tensors moved as torch.load() would.

    Args:
        tree: dictionaries, lists and tuples in it are walked; it is changed in place.
        map_location: None, a device or its name, a dict of names, or a callable of a storage and
            its location that returns a storage, or None to leave it.
    """
    moved: dict[int, Tensor] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            # One tensor for all its names, as it was saved.
            if id(value) not in moved:
                moved[id(value)] = _moved(value, map_location)
            return moved[id(value)]
        if isinstance(value, dict):
            for key in value:
                value[key] = walk(value[key])
        elif isinstance(value, list):
            value[:] = map(walk, value)
        elif type(value) is tuple:
            return tuple(map(walk, value))
        return value

    if map_location is not None:
        walk(tree)
    return tree


def _moved(tensor: Tensor, map_location: MapLocation) -> Tensor:
    if isinstance(map_location, dict):
        return tensor.to(map_location.get("cpu", "cpu"))
    if isinstance(map_location, (str, torch.device)):
        return tensor.to(map_location)
    storage = tensor.untyped_storage()
    mapped = map_location(storage, "cpu")
    if mapped is None or mapped is storage:
        return tensor
    target = torch.empty(0, dtype=tensor.dtype, device=mapped.device)
    target.set_(mapped, tensor.storage_offset(), tensor.shape, tensor.stride())
    return target
