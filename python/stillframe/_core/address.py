"""What a path names: a saved model, or a checkpoint of a run."""

from __future__ import annotations

import os
import re

from stillframe._core.saved import SavedCheckpoint
from stillframe._core.session import list_run
from stillframe.errors import NotFound

_CHECKPOINT_NAME = re.compile(r"0*(\d+)-step-\d+")
_MANIFEST = "manifest.json"


def split_address(path: str | os.PathLike[str]) -> tuple[str, str]:
    """The directory and the selector that a path means: docs/FORMAT.md section 6.

    A directory that holds a manifest.json and no run around it stands for itself, whatever its
    name.
    """
    text = os.fspath(path)
    text = text.rstrip("/") or text
    head, name = os.path.split(text)
    stands_alone = not os.path.islink(text) and os.path.isfile(os.path.join(text, _MANIFEST))
    in_run = os.path.isdir(os.path.join(head, ".stillframe"))
    if stands_alone and not in_run:
        return text, "latest"
    if (found := _CHECKPOINT_NAME.fullmatch(name)) is not None:
        return head or ".", found[1]
    if name in ("latest", "best") and in_run:
        return head or ".", name
    if "@" in name and not os.path.exists(text):
        run, _, selector = text.rpartition("@")
        return run, selector
    return text, "latest"


def open_address(path: str | os.PathLike[str]) -> SavedCheckpoint:
    """Open what a path means.

    Raises:
        NotFound: there is none.
        DataLoss: it is damaged.
    """
    directory, selector = split_address(path)
    if not os.path.isdir(directory):
        raise NotFound(f"{os.fspath(path)}: no such directory")
    return SavedCheckpoint(directory, selector)


def part_path(path: str | os.PathLike[str], saved: SavedCheckpoint, part_index: int) -> str:
    """The file of a part of what open_address() opened.

    Raises:
        NotFound: the checkpoint was removed meanwhile.
    """
    directory, _ = split_address(path)
    sequence = saved.manifest["sequence"]
    file_name = saved.manifest["parts"][part_index]["file"]
    for one in list_run(directory):
        if one["sequence"] == sequence:
            return os.path.join(str(one["path"]), str(file_name))
    raise NotFound(f"{directory}: checkpoint {sequence} was removed meanwhile")
