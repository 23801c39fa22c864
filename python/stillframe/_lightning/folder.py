"""One folder of Lightning checkpoints: its stubs, and the run beside them that they name.

Retention is Lightning's. It removes a displaced checkpoint as soon as save_checkpoint() has
returned, so a removal is queued here, and done when the save behind which it came is durable. The
queue is also written into that save's stub: after a kill the next save takes it up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from stillframe._core.saved import SavedCheckpoint
from stillframe._core.saver import Saver, SaverOptions
from stillframe._core.session import AttachOptions, list_run
from stillframe._core.ticket import Ticket
from stillframe._core.warn import log
from stillframe._lightning.step_watch import step_watch
from stillframe._lightning.stub import Displaced, Stub, read_stub, stubs_in, sync_stub, write_stub
from stillframe._lightning.tree import Fingerprint, Packed, Places, pack
from stillframe.errors import DataLoss, InvalidArgument, NotFound, StillframeError, Unavailable

RUN_NAME = "stillframe-run"
# Those of a Trainer, and of a Fabric whose user calls them so.
_TRAINER_PLACES = Places("state_dict", parts={"optimizer_states": "optimizer"})
_FABRIC_PLACES = Places("model", parts={"optimizer": "optimizer"})
_REMOVE_SECONDS = 10.0
_RETRY_SECONDS = 0.02
# Checkpoints that wait to be removed: about as many more than Lightning's k lie on the drive.
_REMOVAL_COUNT_MAX = 4
_SETTLE_SECONDS = 120.0


@dataclasses.dataclass(frozen=True)
class Request:
    """One save_checkpoint().

    Attributes:
        is_lazy: tells which tensors may be copied later; None copies all of them now.
        capture: for people: which way it is taken, and why.
        is_newest: the file's name means the newest state: last.ckpt and its like.
        waits: return only when the save is durable.
    """

    checkpoint: Mapping[str, Any]
    step: int
    metrics: list[tuple[str, float]]
    is_lazy: Callable[[Tensor], bool] | None
    capture: str
    is_newest: bool
    waits: bool
    allow_pickle: bool


@dataclasses.dataclass(slots=True)
class _Save:
    path: Path
    ticket: Ticket
    stub: Stub


@dataclasses.dataclass(slots=True)
class _Removal:
    displaced: Displaced
    behind: _Save


@dataclasses.dataclass(slots=True)
class _Latest:
    """The newest save, with what tells whether the next one holds the same tensors."""

    save: _Save
    fingerprint: Fingerprint | None
    step_count: int


class Folder:
    """Saves, stubs and removals of one folder. Attaches to the run at the first save.

    Args:
        path: the folder of the .ckpt files; made when absent.
        options: of the run; its directory is in the folder.
        how: what holds for all saves.
    """

    def __init__(self, path: Path, options: AttachOptions, how: SaverOptions) -> None:
        self.path = path
        self.run = path / RUN_NAME
        self._saver = Saver(dataclasses.replace(options, directory=str(self.run)), how)
        self._saves: list[_Save] = []
        self._removals: list[_Removal] = []
        self._failures: list[StillframeError] = []
        self._latest: _Latest | None = None
        self._syncs: list[threading.Thread] = []
        self._save_ids: dict[int, str] = {}  # By sequence, of the saves of this process.
        self._has_durable: bool | None = None

    # --- Saving -----------------------------------------------------------------------------------

    def save(self, name: str, request: Request) -> None:
        """Save, and put the stub in place; see StillframeCheckpointIO.save_checkpoint()."""
        path = self.path / name
        if path.is_dir() and not path.is_symlink():
            raise InvalidArgument(f"{path} is a directory; give the checkpoint another name")
        self.path.mkdir(parents=True, exist_ok=True)
        with self._saver.attach().lock:
            self._saver.make_ready()
            self.note_ends()
            self.raise_failure()
            if self._has_durable is None:
                self._take_up()
            self._make_room()
            save_id = secrets.token_hex(8)
            packed = pack(
                request.checkpoint,
                _TRAINER_PLACES if "state_dict" in request.checkpoint else _FABRIC_PLACES,
                is_lazy=request.is_lazy or _never,
                about={"kind": "lightning", "name": name, "save_id": save_id},
                allow_pickle=request.allow_pickle,
            )
            latest = self._latest
            if latest is not None and self._is_same(latest, packed, request):
                # Lightning saves twice when save_last is set; what differs is in the text.
                shared = dataclasses.replace(
                    latest.save.stub,
                    is_newest=request.is_newest,
                    state=packed.content.state_json.decode(),
                )
                self._put(_Save(path, latest.save.ticket, shared))
            else:
                self._begin(path, save_id, packed, request)

    def _begin(self, path: Path, save_id: str, packed: Packed, request: Request) -> None:
        watch = step_watch()
        fingerprint = packed.fingerprint()
        capture = request.capture
        if packed.lazy is None and request.is_lazy is not None:
            capture = "eager: no tensor belongs to an optimizer that has stepped"
        ticket = self._saver.begin(
            packed.content,
            step=request.step,
            metrics=request.metrics,
            capture=capture,
            lazy=packed.lazy,
        )
        if packed.lazy is not None:
            watch.wait_before_step(self._saver.finish_capture)
        # Not while it could leave the run, or the name, without anything that loads.
        waits = request.waits or not self._has_durable or _is_foreign(path)
        if waits or ticket.sequence is None:
            ticket.wait("durable")
            self._has_durable = True
        assert ticket.sequence is not None
        stub = Stub(RUN_NAME, ticket.sequence, request.step, save_id, is_newest=request.is_newest)
        save = _Save(path, ticket, stub)
        self._saves.append(save)
        self._save_ids[ticket.sequence] = save_id
        self._latest = _Latest(save, fingerprint, watch.step_count)
        self._put(save)

    def _is_same(self, latest: _Latest, packed: Packed, request: Request) -> bool:
        """Whether the newest save holds these very tensors, and can be what this one names."""
        return (
            latest.save.stub.step == request.step
            and latest.step_count == step_watch().step_count
            and latest.save.ticket.state != "failed"
            and not (request.waits and latest.save.ticket.state != "durable")
            and not packed.content.has_pickle
            and latest.fingerprint is not None
            and latest.fingerprint.matches(packed.fingerprint())
        )

    def _put(self, save: _Save) -> None:
        """Put a save's stub in place of what is there."""
        before = _stub_at(save.path)
        if before is not None and before.sequence < save.stub.sequence:
            displaced = Displaced(before.sequence, before.save_id, None)
            self._removals.append(_Removal(displaced, save))
        self._write(save)

    def _write(self, save: _Save) -> None:
        """Write a stub with all removals that have been asked for until now."""
        displaced = tuple(removal.displaced for removal in self._removals)
        save.stub = dataclasses.replace(save.stub, displaced=displaced)
        write_stub(save.path, save.stub)
        # An fsync waits for the drive, which is busy with the checkpoint; training need not.
        self._syncs = [thread for thread in self._syncs if thread.is_alive()]
        sync = threading.Thread(target=_sync, args=(save.path,), daemon=True)
        sync.start()
        self._syncs.append(sync)

    def _take_up(self) -> None:
        """Before the first save: what a killed training left to remove."""
        reason = self.settle()
        if reason is not None:
            raise Unavailable(f"{self.run}: {reason}")
        entries = list_run(str(self.run))
        durable = {(one["sequence"], one["step"]) for one in entries if one["damage"] is None}
        self._has_durable = bool(durable)
        known = {(one["sequence"], one["step"]) for one in entries}
        for name, stub in stubs_in(self.path).items():
            place = (stub.sequence, stub.step)
            if place in durable:
                for displaced in stub.displaced:
                    if displaced.sequence < stub.sequence:
                        self._remove(displaced, _REMOVE_SECONDS, set())
            elif place not in known and not stub.is_newest:
                # Never durable, and nothing stands in for it.
                (self.path / name).unlink(missing_ok=True)

    # --- Removing ---------------------------------------------------------------------------------

    def remove(self, name: str, stub: Stub) -> None:
        """Remove a checkpoint and its stub, behind the newest save."""
        displaced = Displaced(stub.sequence, stub.save_id, name)
        latest = self._latest
        if latest is not None and latest.save.stub.sequence > stub.sequence:
            self._removals.append(_Removal(displaced, latest.save))
            if _stub_at(latest.save.path) == latest.save.stub:
                self._write(latest.save)
            return
        # The owner's wish, with nothing behind it: the name goes; the checkpoint too, if the run
        # has a newer one.
        try:
            self._saver.attach()
            self._remove(displaced, _REMOVE_SECONDS, set())
        except StillframeError as error:
            log.info("%s stays: %s", stub.directory_name, error)
        (self.path / name).unlink(missing_ok=True)

    def _make_room(self) -> None:
        """Before a save: remove what may go, while the daemon has nothing of ours to write.

        It removes on the thread that writes the run, and takes our next message only then: a
        removal asked for during a capture would wait for that capture, whose end it holds up.
        """
        is_behind = len({one.displaced.sequence for one in self._removals}) > _REMOVAL_COUNT_MAX
        if is_behind:
            for save in self._saves:
                with contextlib.suppress(StillframeError):
                    save.ticket.wait("durable")
            self.note_ends()
        if not self._saves:
            self._remove_displaced(_REMOVE_SECONDS if is_behind else 0)

    def _remove_displaced(self, timeout: float) -> None:
        """Ask for what may go, and forget what has gone; the rest is asked for again."""
        waiting = []
        asked: set[int] = set()
        for removal in self._removals:
            if removal.behind.ticket.state == "failed" and self._latest is not None:
                # Nothing came in its place; the newest save will.
                removal.behind = self._latest.save
            is_durable = removal.behind.ticket.state == "durable"
            if not is_durable or not self._remove(removal.displaced, timeout, asked):
                waiting.append(removal)
        self._removals = waiting

    def _has_due_removal(self) -> bool:
        return any(one.behind.ticket.state == "durable" for one in self._removals)

    def _remove(self, displaced: Displaced, timeout: float, asked: set[int]) -> bool:
        """Remove one behind a newer durable one; False to look again later.

        With a timeout of 0 the daemon is asked and not waited for: whether it has done so, or had
        too much to do, the next look tells. Those in `asked` are not asked for again.
        """
        is_gone = True
        is_shared = any(
            stub.save_id == displaced.save_id and name != displaced.stub
            for name, stub in stubs_in(self.path).items()
        )
        if not is_shared:
            try:
                if self._save_id_of(displaced.sequence) != displaced.save_id:
                    raise NotFound("the save never became durable")
                is_gone = displaced.sequence not in asked and (
                    self._saver.attach().remove_checkpoint(displaced.sequence, timeout)
                )
                asked.add(displaced.sequence)
            except NotFound:
                pass
            except (DataLoss, InvalidArgument) as error:
                log.info("%s", error)  # Damaged or pinned: it stays.
                return True
            except StillframeError as error:
                log.info("checkpoint %d is not removed yet: %s", displaced.sequence, error)
                return False
        if displaced.stub is not None:
            path = self.path / displaced.stub
            stub = _stub_at(path)
            if stub is not None and stub.save_id == displaced.save_id:
                path.unlink(missing_ok=True)
        return is_gone

    def _save_id_of(self, sequence: int) -> str | None:
        """Whose checkpoint this is: a sequence that was never committed may be given again."""
        if sequence in self._save_ids:
            return self._save_ids[sequence]
        with SavedCheckpoint(str(self.run), str(sequence)) as saved:
            return save_id_of(saved)

    # --- Waiting and telling ----------------------------------------------------------------------

    def settle(self) -> str | None:
        """Wait until saves that a killed training left captured are durable.

        Returns:
            Why it could not wait, such as that another process writes the run; None if it could.
        """
        try:
            self._saver.finish_capture()
            if self._saver.attach().settle(time.monotonic() + _SETTLE_SECONDS):
                return None
        except StillframeError as error:
            return str(error)
        return f"a save is captured but not durable after {_SETTLE_SECONDS:.0f} s"

    def note_ends(self) -> None:
        """Look which saves have ended, and keep the errors of those that failed."""
        still_open = []
        for save in self._saves:
            error = save.ticket.error
            if error is not None:
                told = type(error)(
                    f"the save of {save.path} (step {save.stub.step}) has failed: {error}"
                )
                told.native = error.native
                self._failures.append(told)
            elif save.ticket.state == "durable":
                self._has_durable = True
            else:
                still_open.append(save)
        self._saves = still_open

    def raise_failure(self) -> None:
        """Raise the first failure that nobody has been told of; each is raised once."""
        if self._failures:
            raise self._failures.pop(0)

    def close(self, timeout: float | None) -> list[Exception]:
        """Wait until every save has ended, do what is queued, let the daemon go.

        Returns:
            The errors that nobody has been told of.
        """
        late: list[Exception] = []
        for save in self._saves:
            try:
                save.ticket.wait("durable", timeout)
            except TimeoutError as error:
                late.append(error)
            except StillframeError:
                pass  # note_ends() has it.
        self.note_ends()
        deadline = time.monotonic() + _REMOVE_SECONDS
        self._remove_displaced(_REMOVE_SECONDS)
        # The daemon may have too many of our earlier wishes to take another.
        while self._has_due_removal() and time.monotonic() < deadline:
            time.sleep(_RETRY_SECONDS)
            self._remove_displaced(_REMOVE_SECONDS)
        for removal in self._removals:
            log.warning(
                "checkpoint %d of %s is not removed yet; the next training in this folder does it",
                removal.displaced.sequence,
                self.run,
            )
        for sync in self._syncs:
            sync.join()
        try:
            self._saver.close(timeout)
        except (StillframeError, TimeoutError):
            pass  # Of the last save, which is among these already.
        failures, self._failures = self._failures, []
        return [*failures, *late]


def save_id_of(saved: SavedCheckpoint) -> str | None:
    """The save_id of a checkpoint; None if another interface saved it."""
    about = saved.state.get("about")
    return about.get("save_id") if isinstance(about, dict) else None


def _never(tensor: Tensor) -> bool:
    return False


def _stub_at(path: Path) -> Stub | None:
    """The stub of this very name, not of where a link leads."""
    try:
        return None if path.is_symlink() else read_stub(path)
    except (OSError, DataLoss):
        return None


def _is_foreign(path: Path) -> bool:
    """Whether something else than a stub has the name, such as a checkpoint of torch.save()."""
    return path.exists() and not path.is_symlink() and _stub_at(path) is None


def _sync(path: Path) -> None:
    try:
        sync_stub(path)
    except OSError as error:
        log.warning("%s may not survive a loss of power: %s", path, os.strerror(error.errno or 0))
