"""Restoring: which checkpoint, and how it gets into the objects of a training.

First everything is compared. Then what has load_state_dict() takes its state, which it may refuse,
and the random number generators theirs; then tensors are filled in place and hyper-parameters set,
which draws no random numbers. A checkpoint that does not fit changes nothing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from stillframe._core.best import Criterion, best_first, criterion_named, stored_criteria
from stillframe._core.garbage import no_collections
from stillframe._core.layout import PartSpec
from stillframe._core.restore_read import ReadStats, read_places
from stillframe._core.saved import SavedCheckpoint
from stillframe._core.session import Session, list_run
from stillframe._core.state_json import decode
from stillframe._core.telling import told_bytes, told_seconds
from stillframe._core.warn import log, warn
from stillframe._torch.members import SECTIONS, Members
from stillframe._torch.restore_members import MembersPlan
from stillframe._torch.restore_optimizer import OptimizerPlan
from stillframe._torch.restore_plan import Problems, Targets
from stillframe._torch.restore_tensors import MapNames, mapped_names, plan_ema, plan_model
from stillframe._torch.tensors import collect_ema, collect_models
from stillframe.errors import DataLoss, InvalidArgument, NotFound

_SETTLE_SECONDS = 120.0


@dataclasses.dataclass(frozen=True)
class Restored:
    """What resume() restored.

    Attributes:
        step: as given to save(): training goes on with the next one.
        sequence: the checkpoint's place in its run.
        metrics: as given to save(), as floats.
        extra: as given to save(); its tensors are new ones.
        epoch: as given to step(), or None.
        directory: of the checkpoint.
        source: "memory" if the daemon still had the snapshot, else "disk".
        seconds: spent in resume(), waiting for earlier saves included.
        bytes: read.
    """

    step: int
    sequence: int
    metrics: dict[str, float]
    extra: Any
    epoch: int | None
    directory: Path
    source: Literal["memory", "disk"]
    seconds: float
    bytes: int


class Restorer:
    """One resume(). The caller holds the session's lock."""

    def __init__(
        self,
        *,
        session: Session,
        directory: str,
        members: Members,
        criteria: Sequence[Criterion],
        allow_pickle: bool,
        register_layout: Callable[[list[PartSpec]], None],
    ) -> None:
        self._session = session
        self._directory = directory
        self._members = members
        self._criteria = criteria
        self._allow_pickle = allow_pickle
        self._register_layout = register_layout

    def restore(
        self,
        which: str | int,
        *,
        falls_back: bool,
        strict: bool,
        only: str | Sequence[str] | None,
        map_names: MapNames,
    ) -> Restored | None:
        """Restore the first candidate that is intact; see Checkpointer.resume()."""
        begin = time.monotonic()
        if not self._session.settle(begin + _SETTLE_SECONDS):
            raise TimeoutError(
                f"a save of {self._directory} is captured but not durable after "
                f"{_SETTLE_SECONDS:.0f} s; ask `stillframe status` what the daemon does"
            )
        entries = list_run(self._directory)
        if not entries:
            return None
        damages: list[str] = []
        for selector in self._candidates(which, entries):
            damage = _known_damage(selector, entries)
            try:
                if damage is not None:
                    raise DataLoss(damage)
                with (
                    no_collections(),
                    SavedCheckpoint(self._directory, selector, self._session) as saved,
                ):
                    if damages:
                        step = saved.manifest["step"]
                        warn(f"{'; '.join(damages)}; restoring step {step} instead")
                    return self._restore_one(saved, entries, begin, strict, only, map_names)
            except DataLoss as error:
                damages.append(f"checkpoint {selector} of {self._directory}: {error}")
                if not falls_back:
                    raise DataLoss(damages[-1]) from error
        if not damages:
            raise NotFound(f"{self._directory} has no checkpoint {which!r}")
        raise DataLoss(
            "no checkpoint can be restored, and what was to be may hold unverified bytes: "
            f"{'; '.join(damages)}"
        )

    def _candidates(self, which: str | int, entries: Sequence[dict[str, Any]]) -> Iterator[str]:
        """Selectors, the wanted one first; each is a sequence where the list can tell."""
        newest_first = [entry for entry in reversed(entries)]
        if isinstance(which, int):
            newest_first = [entry for entry in newest_first if entry["step"] == which]
        elif which == "best" or which.startswith("best:"):
            metric = which.partition(":")[2] or None
            newest_first = best_first(
                criterion_named(self._criteria or stored_criteria(entries), metric), newest_first
            )
        elif which != "latest":
            if "\0" in which:
                raise InvalidArgument(f"the tag {which!r} has a NUL in it")
            yield which
            return
        for entry in newest_first:
            yield str(entry["sequence"])

    def _restore_one(
        self,
        saved: SavedCheckpoint,
        entries: Sequence[dict[str, Any]],
        begin: float,
        strict: bool,
        only: str | Sequence[str] | None,
        map_names: MapNames,
    ) -> Restored:
        sections, prefixes = _selected(only)
        problems = Problems(is_strict=strict)
        in_place, new = Targets(saved), Targets(saved)
        step = saved.manifest["step"]
        what = f"step {step} of {self._directory}"
        _compare_names_given(saved, self._members, sections, problems)
        problems.raise_if_any(what)
        models = collect_models(self._members.models)
        mapped = mapped_names(saved, models, map_names)
        plan_model(saved, models, mapped, "model" in sections, prefixes, in_place, problems)
        if "ema" in sections:
            plan_ema(saved, collect_ema(self._members.ema), in_place, problems)
        after: list[Callable[[], None]] = []
        if "optimizer" in sections:
            plan = OptimizerPlan(
                saved, models, mapped, in_place, problems, allow_pickle=self._allow_pickle
            )
            after += plan.plan(self._members.optimizers)
        members = MembersPlan(saved, self._members, new, problems, allow_pickle=self._allow_pickle)
        members.plan(sections, models)
        extra = self._decode(saved.state.get("extra"), "extra", new)
        rng = self._decode(saved.state.get("rng"), "rng", new)
        if "rng" in sections and rng is not None:
            members.plan_rng(rng)
        problems.raise_if_any(what)

        if only is None and saved.manifest["sequence"] == entries[-1]["sequence"]:
            # The daemon may still have it in memory, in an arena that this hands over to us.
            self._register_layout(saved.parts)
        stats = self._fill(saved, members, new, in_place)
        for apply in after:
            apply()
        sequence = saved.manifest["sequence"]
        path = next(entry["path"] for entry in entries if entry["sequence"] == sequence)
        restored = Restored(
            step=step,
            sequence=sequence,
            metrics={name: float(value) for name, value in saved.manifest["metrics"].items()},
            extra=extra,
            epoch=saved.state.get("epoch"),
            directory=Path(path),
            source="memory" if stats.is_from_memory else "disk",
            seconds=time.monotonic() - begin,
            bytes=stats.bytes,
        )
        log.info(
            "restored step=%d from=%s bytes=%s took=%s",
            step,
            restored.source,
            told_bytes(restored.bytes),
            told_seconds(restored.seconds),
        )
        return restored

    def _fill(
        self, saved: SavedCheckpoint, members: MembersPlan, new: Targets, in_place: Targets
    ) -> ReadStats:
        """What may refuse first, in new memory; then what is overwritten."""
        stats = read_places(saved, new.places, "reading state")
        new.finish()
        members.load()
        try:
            stats += read_places(saved, in_place.places, "restoring")
        except BaseException:
            members.roll_back()
            raise
        in_place.finish()
        return stats

    def _decode(self, value: Any, path: str, targets: Targets) -> Any:
        if value is None:
            return None
        return decode(value, path, tensor=targets.add_new, allow_pickle=self._allow_pickle)


def _selected(only: str | Sequence[str] | None) -> tuple[frozenset[str], tuple[str, ...]]:
    """Sections and name prefixes."""
    if only is None:
        return frozenset(SECTIONS), ()
    words = (only,) if isinstance(only, str) else tuple(only)
    if not words or not all(isinstance(word, str) and word for word in words):
        raise InvalidArgument(
            f"only={only!r} must be of {', '.join(SECTIONS)}, or prefixes of tensor names"
        )
    return (
        frozenset(word for word in words if word in SECTIONS),
        tuple(word for word in words if word not in SECTIONS),
    )


def _compare_names_given(
    saved: SavedCheckpoint, members: Members, sections: frozenset[str], problems: Problems
) -> None:
    """A dict of one is not the same as one: the names in the checkpoint differ."""
    named = saved.state.get("named")
    if named is None:
        return
    # Not the model's: map_names= may lead from one to the other.
    for section in sorted(sections & members.given() & saved.state.keys() - {"model"}):
        if (section in named) != (section in members.named):
            problems.other(
                f"{section}= was {'a dict' if section in named else 'one object'} at the save and "
                f"is {'a dict' if section in members.named else 'one object'} now"
            )


def _known_damage(selector: str, entries: Sequence[dict[str, Any]]) -> str | None:
    for entry in entries:
        if str(entry["sequence"]) == selector and entry["damage"] is not None:
            return str(entry["damage"])
    return None
