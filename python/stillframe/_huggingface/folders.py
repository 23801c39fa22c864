"""The folders checkpoint-N of a transformers.Trainer, and which save is behind each.

A folder is written at once and looks like one of the stock Trainer, but its `model.safetensors` is
a link into the run beside it: `../_stillframe/00000012-step-30/model.safetensors`. The link says
which save the folder belongs to, and leads nowhere until that save is durable. So nothing has to
be kept in step with the folder: not a file of ours, not its times.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

# Uploads to the Hub leave out what begins with an underscore.
RUN_NAME = "_stillframe"
WEIGHTS_NAME = "model.safetensors"
STATE_NAME = "trainer_state.json"

_FOLDER = re.compile(r"checkpoint-(\d+)")
_CHECKPOINT = re.compile(r"(\d{8,})-step-\d+")
# Any of these makes a folder one that the stock Trainer can load.
_STOCK_WEIGHTS = (
    WEIGHTS_NAME,
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
# What the stock Trainer writes besides, and a save of ours must not leave beside its own weights.
_STOCK_STATE = (
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "model-*.safetensors",
)


@dataclasses.dataclass(frozen=True)
class Folder:
    """One checkpoint-N.

    Attributes:
        sequence: of the save that its weights link to; None without such a link.
        is_stock: it has weights of its own, written by the stock Trainer.
    """

    path: Path
    step: int
    sequence: int | None
    is_stock: bool

    @property
    def directory(self) -> Path:
        """The output directory that it is in, whatever links lead here."""
        return Path(os.path.realpath(self.path)).parent


def read_folder(path: Path) -> Folder | None:
    """The folder as it is now, whatever its name (step -1 if it has none); None if it is none."""
    if not path.is_dir():
        return None
    match = _FOLDER.fullmatch(path.name)
    run = Path(os.path.realpath(path)).parent / RUN_NAME
    sequence = linked_sequence(path / WEIGHTS_NAME, run)
    is_stock = sequence is None and (
        any((path / name).exists() for name in _STOCK_WEIGHTS)
        # FSDP and DeepSpeed keep theirs in folders below; what nobody knows is left alone.
        or not (path / STATE_NAME).exists()
        or any(child.is_dir() for child in path.iterdir())
    )
    return Folder(path, int(match[1]) if match else -1, sequence, is_stock)


def read_folders(directory: Path) -> list[Folder]:
    """All that are in an output directory, in no order."""
    children = directory.iterdir() if directory.is_dir() else ()
    found = [read_folder(child) for child in children if _FOLDER.fullmatch(child.name)]
    return [folder for folder in found if folder is not None]


def linked_sequence(link: Path, run: Path) -> int | None:
    """The sequence that a link into the run names, whether it exists or not; else None."""
    if not link.is_symlink():
        return None
    target = Path(os.path.realpath(link.parent), os.readlink(link))
    match = _CHECKPOINT.fullmatch(target.parent.name)
    return int(match[1]) if match and _is_same(target.parent.parent, run) else None


def make_link(link: Path, run: Path, sequence: int, step: int, file_name: str) -> None:
    """Let `link` name a file of a checkpoint that need not exist yet; replaces what is there."""
    target = Path(os.path.abspath(run), f"{sequence:08d}-step-{step}", file_name)
    new = link.with_name(f"{link.name}~")
    new.unlink(missing_ok=True)
    # Relative: the output directory may be moved.
    new.symlink_to(os.path.relpath(target, os.path.realpath(link.parent)))
    new.replace(link)


def unlink_weights(folder: Path) -> None:
    """Take our link away. Who writes to it otherwise writes into the checkpoint behind it."""
    link = folder / WEIGHTS_NAME
    if linked_sequence(link, Path(os.path.realpath(folder)).parent / RUN_NAME) is not None:
        link.unlink()


def remove_stock_state(folder: Path) -> None:
    """Remove what an older save of the stock Trainer has left in the folder of a new one."""
    for pattern in (*_STOCK_WEIGHTS, *_STOCK_STATE):
        for path in folder.glob(pattern):
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Make the small files beside the weights survive a power cut, as the weights do."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    for path in (*files, folder, folder.parent):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def in_order(folders: Sequence[Folder]) -> list[Folder]:
    """Oldest first: ours by sequence, and those of the stock Trainer between them by step.

    Never by time: rewriting a file, copying or a wrong clock changes that.
    """
    ours = sorted((f for f in folders if f.sequence is not None), key=lambda f: f.sequence or 0)
    stock = sorted((f for f in folders if f.sequence is None), key=lambda f: f.step)
    merged: list[Folder] = []
    for folder in ours:
        while stock and stock[0].step < folder.step:
            merged.append(stock.pop(0))
        merged.append(folder)
    return merged + stock


@dataclasses.dataclass(frozen=True)
class Removals:
    """What a rotation is to remove: folders, and checkpoints that no folder names any more."""

    folders: list[Folder]
    sequences: list[int]


def choose_removals(
    folders: Sequence[Folder],
    entries: Mapping[int, Mapping[str, Any]],
    *,
    limit: int | None,
    best: Path | None,
    in_flight: Collection[int | None],
) -> Removals:
    """What may go behind the newest durable save; nothing while there is none.

    The newest, the best, and what a tag protects stay, and so does what is damaged: that is for
    people to look at.

    Args:
        folders: all of the output directory.
        entries: the run's checkpoints by sequence, as list_run() tells them.
        limit: how many folders may stay; None or 0 is no limit.
        best: the folder of the best checkpoint.
        in_flight: sequences of saves that are still being written.
    """
    durable = {number for number, entry in entries.items() if entry["damage"] is None}
    ours = [folder for folder in folders if folder.sequence in durable]
    if not ours:
        return Removals([], [])
    newest = max(ours, key=lambda folder: folder.sequence or 0)
    newest_sequence = newest.sequence or 0
    by_step = {folder.step: folder.sequence for folder in ours}
    # A step that was trained again has replaced its folder, as the stock Trainer does.
    replaced = [
        number
        for number in durable
        if number < (by_step.get(entries[number]["step"]) or 0) and not entries[number]["tags"]
    ]
    if not limit or limit < 0:
        return Removals([], replaced)
    kept = in_order([folder for folder in folders if folder.is_stock or folder.sequence in durable])
    protected = {newest.path, kept[-1].path}
    protected |= {folder.path for folder in ours if entries[folder.sequence or 0]["tags"]}
    if best is not None:
        protected |= {folder.path for folder in kept if _is_same(folder.path, best)}
    excess = max(0, len(kept) - max(limit, len(protected)))
    victims = [folder for folder in kept if folder.path not in protected][:excess]
    # What a kill left behind: sequences are durable in their order, so these never will be.
    stubs = [
        folder
        for folder in folders
        if not folder.is_stock
        and folder.sequence not in in_flight
        and folder.sequence not in entries
        and (folder.sequence is None or folder.sequence < newest_sequence)
    ]
    return Removals(victims + stubs, replaced)


def _is_same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
