"""Stubs: small files under the names that a framework gives its checkpoints.

A stub names a checkpoint of a run. It is there as soon as the save has begun; the checkpoint is
durable once its directory exists, which only the commit makes. So a stub never has to be changed
when the save ends, and one whose checkpoint is missing is one that a kill left behind.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from stillframe.errors import DataLoss

_MAGIC = b'{"stillframe_stub": 1,'
_BYTES_MAX = 16 * 2**20
_NOTE = "names a checkpoint, which is durable once its directory exists; load it with Stillframe"


@dataclasses.dataclass(frozen=True, slots=True)
class Displaced:
    """A checkpoint that is to go once the stub's own one is durable; and its stub's name."""

    sequence: int
    save_id: str
    stub: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Stub:
    """What a stub says.

    Attributes:
        run: the run's directory, relative to the stub's.
        sequence: the checkpoint's in that run.
        step: its step. A sequence that was never committed may be given again.
        save_id: unique for each save; the checkpoint's state.json has it too.
        is_newest: the stub's name means the newest state, whichever that is.
        displaced: what goes when the checkpoint is durable.
        state: a state.json for the checkpoint's tensors in place of its own; None: its own.
    """

    run: str
    sequence: int
    step: int
    save_id: str
    is_newest: bool = False
    displaced: tuple[Displaced, ...] = ()
    state: str | None = None

    @property
    def directory_name(self) -> str:
        """The checkpoint's (docs/FORMAT.md section 6)."""
        return f"{self.sequence:08d}-step-{self.step}"


def write_stub(path: Path, stub: Stub) -> None:
    """Put a stub in place, atomically; not yet synced to the drive."""
    members: dict[str, Any] = {
        "stillframe_stub": 1,
        "note": _NOTE,
        "checkpoint": f"{stub.run}/{stub.directory_name}",
        "run": stub.run,
        "sequence": stub.sequence,
        "step": stub.step,
        "save_id": stub.save_id,
        "is_newest": stub.is_newest,
        "displaced": [[one.sequence, one.save_id, one.stub] for one in stub.displaced],
    }
    if stub.state is not None:
        members["state"] = stub.state
        members["state_sha256"] = _digest(stub.state)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}~")
    unfinished.write_text(json.dumps(members, indent=1).replace("{\n ", "{", 1) + "\n")
    os.replace(unfinished, path)


def sync_stub(path: Path) -> None:
    """Make a stub survive a loss of power; one that is gone meanwhile is no error."""
    for place in (path, path.parent):
        try:
            descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_stub(path: Path) -> Stub | None:
    """The stub at `path`; None if another kind of file is there.

    Raises:
        FileNotFoundError: nothing is there.
        IsADirectoryError: a directory is.
        DataLoss: a stub that is damaged.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            return None
        file.seek(0)
        text = file.read(_BYTES_MAX + 1)
    try:
        members = json.loads(text)
        state = members.get("state")
        if state is not None and members["state_sha256"] != _digest(state):
            raise ValueError("its state fails its checksum")
        return Stub(
            run=_expect(members["run"], str),
            sequence=_expect(members["sequence"], int),
            step=_expect(members["step"], int),
            save_id=_expect(members["save_id"], str),
            is_newest=_expect(members["is_newest"], bool),
            displaced=tuple(Displaced(*one) for one in members["displaced"]),
            state=state,
        )
    except (LookupError, TypeError, ValueError) as error:
        raise DataLoss(f"{path} is a damaged Stillframe stub: {error}") from error


def stubs_in(folder: Path) -> dict[str, Stub]:
    """All intact stubs of a folder, by file name; links to stubs are not stubs of their own."""
    found = {}
    for entry in os.scandir(folder):
        if not entry.is_file(follow_symlinks=False):
            continue
        try:
            stub = read_stub(Path(entry.path))
        except (OSError, DataLoss):
            continue
        if stub is not None:
            found[entry.name] = stub
    return found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} instead of {kind.__name__}")
    return value
