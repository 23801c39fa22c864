"""The run of one Trainer: its Checkpointer, the saves under way, their folders, the rotation."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from stillframe._core.saver import EXIT_SECONDS
from stillframe._core.session import AttachOptions, Session, list_run
from stillframe._core.ticket import Ticket
from stillframe._core.warn import log, warn
from stillframe._huggingface.folders import (
    RUN_NAME,
    WEIGHTS_NAME,
    Folder,
    Removals,
    choose_removals,
    linked_sequence,
    make_link,
    read_folders,
    sync_folder,
)
from stillframe._torch.checkpointer import Checkpointer
from stillframe._torch.restore import Restored
from stillframe.errors import InvalidArgument, NotFound, StillframeError

SETTLE_SECONDS = 120.0
# Removing is a rename; a drive that takes longer goes on by itself.
_REMOVE_SECONDS = 2.0


class TrainerRun:
    """Saves of one output directory; open for as long as train() runs.

    Args:
        directory: the output directory; the run is `_stillframe` in it.
        model: the bare model.
        optimizer: the torch optimizer itself, not a wrapper around it; None saves the model alone.
        scheduler: the learning rate scheduler, or None.
        options: further arguments of the Checkpointer.

    Raises:
        InvalidArgument: an option is wrong, or is keep_last.
    """

    def __init__(
        self,
        directory: Path,
        *,
        model: nn.Module,
        optimizer: Optimizer | None,
        scheduler: Any,
        options: Mapping[str, Any],
    ) -> None:
        if "keep_last" in options:
            raise InvalidArgument("stillframe_options has keep_last; use save_total_limit instead")
        self.directory = directory
        self.path = directory / RUN_NAME
        self._objects = (model, optimizer, scheduler)
        self.checkpointer = Checkpointer(
            self.path,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            keep_last=None,
            **options,
        )
        self._pending: list[tuple[Ticket, Path]] = []
        # Durable, but their small files are not synced yet.
        self._ended: list[Path] = []
        self._removing: set[int] = set()
        # Syncs and removes while training goes on; joined before anything else touches folders.
        self._keeper: threading.Thread | None = None

    def serves(self, directory: Path, model: Any, optimizer: Any, scheduler: Any) -> bool:
        """Whether it is the run of these."""
        same = zip(self._objects, (model, optimizer, scheduler), strict=True)
        return directory == self.directory and all(mine is theirs for mine, theirs in same)

    def is_of(self, directory: Path, model: nn.Module) -> bool:
        """Whether it can restore that model from that directory."""
        return directory == self.directory and model is self._objects[0]

    def prepare(self) -> None:
        """Have everything ready for the first save, if that can be; the save says if not."""
        try:
            self.checkpointer.prepare()
        except StillframeError as error:
            log.info("%s is not attached yet: %s", self.path, error)

    def begin_folder(self) -> None:
        """Call before the files of a folder are written: ends what is done with older ones."""
        self._join_keeper()
        self._note_ended()

    def save(self, step: int, folder: Path, metrics: Mapping[str, float], extra: Any) -> None:
        """Begin the save behind a folder whose other files are there, and link its weights.

        Where nothing was begun, the Checkpointer has warned of it, and the folder goes.

        Raises:
            StillframeError: as Checkpointer.save(); the folder is as it was.
        """
        ticket = self.checkpointer.save(step, metrics=metrics, extra=extra)
        if ticket.sequence is None:
            shutil.rmtree(folder, ignore_errors=True)
            return
        make_link(folder / WEIGHTS_NAME, self.path, ticket.sequence, step, WEIGHTS_NAME)
        self._pending.append((ticket, folder))

    def restore(self, sequence: int, sections: list[str]) -> Restored:
        """Fill these sections from a checkpoint; see Checkpointer.resume() for what it raises."""
        restored = self.checkpointer.resume(str(sequence), on_damage="raise", only=sections)
        assert restored is not None  # The folder's link led to it.
        return restored

    def drain(self, timeout: float | None = None) -> None:
        """Wait until every save has ended, one way or the other, and its folder is synced.

        Raises:
            TimeoutError: one has not in that time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        for ticket, _ in self._pending:
            rest = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                ticket.wait("durable", rest)
            except StillframeError:
                pass  # _note_ended() and the Checkpointer tell of it.
        self._join_keeper()
        self._note_ended()
        self._sync_ended()

    def rotate(self, limit: int | None, best: str | None, *, waits: bool = False) -> None:
        """Remove what is over the limit, behind a newer durable save; see choose_removals().

        The drive's part of it is done by another thread, unless `waits`. Never raises: what could
        not be removed is there for the next rotation.
        """
        self._join_keeper()
        self._note_ended()
        try:
            removals = self._choose(limit, best)
        except (StillframeError, OSError) as error:
            log.warning("%s is not rotated: %s", self.directory, error)
            return
        if waits:
            self._sync_and_remove(removals, _REMOVE_SECONDS)
        elif self._ended or removals.folders or removals.sequences:
            self._keeper = threading.Thread(
                target=self._sync_and_remove, args=(removals, 0.0), name="stillframe-folders"
            )
            self._keeper.start()

    def close(self) -> None:
        """Wait for the saves, then let the daemon go.

        Raises:
            StillframeError: the last save has failed.
        """
        self.drain()
        self.checkpointer.close()

    def leave(self) -> None:
        """Close in a hurry, while another error ends the training. Does not raise."""
        try:
            self._join_keeper()
            self.checkpointer.close(timeout=EXIT_SECONDS)
        except (StillframeError, TimeoutError) as error:
            warn(f"while another error ended the training: {error}")
        self._note_ended()
        self._sync_ended()

    def _note_ended(self) -> None:
        """Sort out the saves that have ended: folders of failed ones go."""
        pending, self._pending = self._pending, []
        for ticket, folder in pending:
            state = ticket.state
            if state == "durable":
                self._ended.append(folder)
            elif state != "failed":
                self._pending.append((ticket, folder))
            elif linked_sequence(folder / WEIGHTS_NAME, self.path) == ticket.sequence:
                # The Checkpointer warns of the failure itself.
                log.warning("removing %s: its save has failed: %s", folder, ticket.error)
                shutil.rmtree(folder, ignore_errors=True)

    def _choose(self, limit: int | None, best: str | None) -> Removals:
        entries = {entry["sequence"]: entry for entry in list_run(os.fspath(self.path))}
        removals = choose_removals(
            read_folders(self.directory),
            entries,
            limit=limit,
            best=Path(best) if best is not None else None,
            in_flight={ticket.sequence for ticket, _ in self._pending},
        )
        # Asked for before, and still there.
        self._removing &= entries.keys()
        removals.sequences.extend(self._removing)
        return removals

    def _sync_and_remove(self, removals: Removals, timeout: float) -> None:
        if not self._sync_ended():
            return
        for sequence in removals.sequences:
            self._remove(sequence, timeout)
        for folder in removals.folders:
            if folder.sequence is None or self._remove(folder.sequence, timeout):
                log.info("removing %s, by save_total_limit", folder.path)
                shutil.rmtree(folder.path, ignore_errors=True)

    def _sync_ended(self) -> bool:
        """Sync the small files of durable folders; False if that failed."""
        try:
            while self._ended:
                if self._ended[0].is_dir():
                    sync_folder(self._ended[0])
                self._ended.pop(0)
        except OSError as error:
            log.warning("%s cannot be synced: %s", self._ended[0], error)
            return False
        return True

    def _remove(self, sequence: int, timeout: float) -> bool:
        """Have a checkpoint removed; whether its folder may go, too."""
        try:
            if not self.checkpointer._saver.attach().remove_checkpoint(sequence, timeout):
                self._removing.add(sequence)  # The daemon may go on with it.
        except NotFound:
            pass
        except StillframeError as error:
            log.warning("checkpoint %d of %s stays: %s", sequence, self.path, error)
            return False
        return True

    def _join_keeper(self) -> None:
        if self._keeper is not None:
            self._keeper.join()
            self._keeper = None


def settled_folders(directory: Path) -> tuple[list[Folder], dict[int, dict[str, Any]]]:
    """Folders and the run's checkpoints, after saves of an earlier trainer have ended.

    Raises:
        TimeoutError: a save is captured but does not become durable.
        StillframeError: as Session().
    """
    path = directory / RUN_NAME
    if not path.is_dir():
        return read_folders(directory), {}
    session = Session(AttachOptions(directory=os.path.abspath(path)))
    try:
        if not session.settle(time.monotonic() + SETTLE_SECONDS):
            raise TimeoutError(
                f"a save of {path} is captured but not durable after {SETTLE_SECONDS:.0f} s; ask "
                "`stillframe status` what the daemon does"
            )
    finally:
        session.close(EXIT_SECONDS)
    entries = {entry["sequence"]: entry for entry in list_run(os.fspath(path))}
    return read_folders(directory), entries
