"""Restoring: which checkpoint, and how it gets into the objects of a training.

First everything is compared, then tensors are filled in place, then what is not a tensor is set. A
checkpoint that does not fit changes nothing.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from stillframe._layout import PartSpec
from stillframe._restore_optimizer import OptimizerPlan
from stillframe._restore_plan import Problems, Targets
from stillframe._rng import restore_rng
from stillframe._saved import SavedCheckpoint, SavedTensor
from stillframe._session import AttachOptions, Session, list_run
from stillframe._state_json import decode
from stillframe._tensors import ModelTensors, collect_models
from stillframe.errors import DataLoss, InvalidArgument, NotFound

SECTIONS = ("model", "optimizer", "scheduler", "rng")
_SETTLE_SECONDS = 120.0

MapNames = Mapping[str, str] | Callable[[str], str | None] | None


@dataclasses.dataclass(frozen=True)
class Restored:
    """What resume() restored.

    Attributes:
        step: as given to save(): training goes on with the next one.
        sequence: the checkpoint's place in its run.
        metrics: as given to save(), as floats.
        extra: as given to save(); its tensors are new ones.
        directory: of the checkpoint.
        source: "memory" if the daemon still had the snapshot, else "disk".
        seconds: spent in resume(), waiting for earlier saves included.
        bytes: read.
    """

    step: int
    sequence: int
    metrics: dict[str, float]
    extra: Any
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
        options: AttachOptions,
        models: Mapping[str | None, nn.Module],
        optimizers: Mapping[str | None, Optimizer],
        schedulers: Mapping[str | None, Any],
        allow_pickle: bool,
        warn: Callable[[str], None],
        register_layout: Callable[[list[PartSpec]], None],
    ) -> None:
        self._session = session
        self._options = options
        self._models = models
        self._optimizers = optimizers
        self._schedulers = schedulers
        self._allow_pickle = allow_pickle
        self._warn = warn
        self._register_layout = register_layout

    def restore(
        self,
        which: str | int,
        *,
        falls_back: bool,
        strict: bool,
        only: Sequence[str] | None,
        map_names: MapNames,
    ) -> Restored | None:
        """Restore the first candidate that is intact; see Checkpointer.resume()."""
        begin = time.monotonic()
        if not self._session.settle(begin + _SETTLE_SECONDS):
            raise TimeoutError(
                f"a save of {self._options.directory} is captured but not durable after "
                f"{_SETTLE_SECONDS:.0f} s; ask `stillframe status` what the daemon does"
            )
        entries = list_run(self._options.directory)
        if not entries:
            return None
        damages: list[str] = []
        for selector in self._candidates(which, entries):
            damage = _known_damage(selector, entries)
            try:
                if damage is not None:
                    raise DataLoss(damage)
                with SavedCheckpoint(self._options.directory, selector, self._session) as saved:
                    if damages:
                        step = saved.manifest["step"]
                        self._warn(f"{'; '.join(damages)}; restoring step {step} instead")
                    return self._restore_one(saved, entries, begin, strict, only, map_names)
            except DataLoss as error:
                damages.append(f"checkpoint {selector} of {self._options.directory}: {error}")
                if not falls_back:
                    raise DataLoss(damages[-1]) from error
        if not damages:
            raise NotFound(f"{self._options.directory} has no checkpoint {which!r}")
        raise DataLoss(
            "no checkpoint can be restored, and what was to be may hold unverified bytes: "
            f"{'; '.join(damages)}"
        )

    def _candidates(self, which: str | int, entries: Sequence[dict[str, Any]]) -> Iterator[str]:
        """Selectors, the wanted one first; each is a sequence where the list can tell."""
        newest_first = [entry for entry in reversed(entries)]
        if isinstance(which, int):
            newest_first = [entry for entry in newest_first if entry["step"] == which]
        elif which == "best":
            newest_first = self._best_first(newest_first)
        elif which != "latest":
            if "\0" in which:
                raise InvalidArgument(f"the tag {which!r} has a NUL in it")
            yield which
            return
        for entry in newest_first:
            yield str(entry["sequence"])

    def _best_first(self, newest_first: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        if not self._options.best:
            raise InvalidArgument('resume("best") needs monitor= of the Checkpointer')
        metric, mode, _ = self._options.best[0]
        ranked = []
        for entry in newest_first:
            value = float(entry["metrics"].get(metric, "nan"))
            if value == value:
                ranked.append((-value if mode == "max" else value, entry))
        # Stable: of equals the newest comes first.
        return [entry for _, entry in sorted(ranked, key=lambda pair: pair[0])]

    def _restore_one(
        self,
        saved: SavedCheckpoint,
        entries: Sequence[dict[str, Any]],
        begin: float,
        strict: bool,
        only: Sequence[str] | None,
        map_names: MapNames,
    ) -> Restored:
        sections, prefixes = _selected(only)
        problems = Problems(is_strict=strict)
        targets = Targets(saved)
        models = collect_models(self._models)
        mapped = _mapped_names(saved, models, map_names)
        _plan_model(saved, models, mapped, sections, prefixes, targets, problems)
        after: list[Callable[[], None]] = []
        if "model" in sections:
            after += self._plan_extra_states(saved, models, targets, problems)
        if "optimizer" in sections:
            plan = OptimizerPlan(
                saved, models, mapped, targets, problems, allow_pickle=self._allow_pickle
            )
            after += plan.plan(self._optimizers)
        if "scheduler" in sections:
            after += self._plan_schedulers(saved, targets, problems)
        extra = self._decode(saved.state.get("extra"), "extra", targets)
        rng = self._decode(saved.state.get("rng"), "rng", targets)
        step = saved.manifest["step"]
        problems.raise_if_any(f"step {step} of {self._options.directory}")

        if only is None and saved.manifest["sequence"] == entries[-1]["sequence"]:
            # The daemon may still have it in memory, in an arena that this hands over to us.
            self._register_layout(saved.parts)
        stats = saved.read(targets.places)
        targets.finish()
        for apply in after:
            apply()
        if "rng" in sections and rng is not None:
            restore_rng(rng)
        sequence = saved.manifest["sequence"]
        path = next(entry["path"] for entry in entries if entry["sequence"] == sequence)
        return Restored(
            step=step,
            sequence=sequence,
            metrics={name: float(value) for name, value in saved.manifest["metrics"].items()},
            extra=extra,
            directory=Path(path),
            source="memory" if stats.from_memory else "disk",
            seconds=time.monotonic() - begin,
            bytes=stats.bytes,
        )

    def _decode(self, value: Any, path: str, targets: Targets) -> Any:
        if value is None:
            return None
        return decode(value, path, tensor=targets.add_new, allow_pickle=self._allow_pickle)

    def _plan_extra_states(
        self,
        saved: SavedCheckpoint,
        models: ModelTensors,
        targets: Targets,
        problems: Problems,
    ) -> list[Callable[[], None]]:
        states = saved.state.get("model", {}).get("extra_state", {})
        problems.missing(sorted(models.stateful.keys() - states.keys()))
        problems.unknown(sorted(states.keys() - models.stateful.keys()))
        after: list[Callable[[], None]] = []
        for name, module in models.stateful.items():
            if name in states:
                value = self._decode(states[name], f"model.{name}", targets)
                after.append(_call(module.set_extra_state, value))
        return after

    def _plan_schedulers(
        self, saved: SavedCheckpoint, targets: Targets, problems: Problems
    ) -> list[Callable[[], None]]:
        state = saved.state.get("scheduler")
        if not self._schedulers:
            if state is not None:
                problems.unknown(["scheduler (pass scheduler=, or leave it out by only=)"])
            return []
        if state is None:
            problems.missing(["scheduler"])
            return []
        if None in self._schedulers:
            states = {None: state}
        else:
            states = state
            problems.missing(
                [f"scheduler.{name}" for name in self._schedulers if name not in state]
            )
            problems.unknown(
                [f"scheduler.{name}" for name in state if name not in self._schedulers]
            )
        after: list[Callable[[], None]] = []
        for name, one in self._schedulers.items():
            if name in states:
                path = "scheduler" if name is None else f"scheduler.{name}"
                value = _with_types_of(one.state_dict(), self._decode(states[name], path, targets))
                after.append(_call(one.load_state_dict, value))
        return after


def _plan_model(
    saved: SavedCheckpoint,
    models: ModelTensors,
    mapped: dict[str, str],
    sections: frozenset[str],
    prefixes: tuple[str, ...],
    targets: Targets,
    problems: Problems,
) -> None:
    """Pair the model's tensors with the checkpoint's."""

    def is_selected(name: str) -> bool:
        return "model" in sections or (bool(prefixes) and name.startswith(prefixes))

    tensors = saved.tensors.get("model", {})
    sources: dict[str, SavedTensor] = {}
    unknown = []
    for saved_name, tensor in tensors.items():
        names = [live for name, live in mapped.items() if name == saved_name]
        names += [mapped[a] for a, owner in saved.aliases().items() if owner == saved_name]
        known = [
            models.canonical(name) for name in names if models.canonical(name) in models.tensors
        ]
        for name in known:
            sources.setdefault(name, tensor)
        if names and not known and any(map(is_selected, names)):
            unknown.append(saved_name)
    problems.unknown(unknown)
    selected = {name: live for name, live in models.tensors.items() if is_selected(name)}
    if prefixes and "model" not in sections and not selected:
        raise InvalidArgument(f"only={list(prefixes)} selects none of the model's tensors")
    for name, live in selected.items():
        source = sources.get(name)
        if source is None:
            problems.missing([name])
        elif problems.fits(name, source.spec, live):
            targets.add(source, name, live)


def _mapped_names(
    saved: SavedCheckpoint, models: ModelTensors, map_names: MapNames
) -> dict[str, str]:
    """The checkpoint's model names, tied ones included, and what the model calls them."""
    names = [*saved.tensors.get("model", {}), *saved.aliases()]
    if map_names is None:
        return {name: name for name in names}
    mapped = {}
    for name in names:
        new = map_names.get(name, name) if isinstance(map_names, Mapping) else map_names(name)
        if new is not None:
            mapped[name] = new
    return mapped


def _selected(only: Sequence[str] | None) -> tuple[frozenset[str], tuple[str, ...]]:
    """Sections and name prefixes."""
    if only is None:
        return frozenset(SECTIONS), ()
    if isinstance(only, str):
        raise InvalidArgument(f"only={only!r} is a text, not a list of them")
    return (
        frozenset(word for word in only if word in SECTIONS),
        tuple(word for word in only if word not in SECTIONS),
    )


def _known_damage(selector: str, entries: Sequence[dict[str, Any]]) -> str | None:
    for entry in entries:
        if str(entry["sequence"]) == selector and entry["damage"] is not None:
            return str(entry["damage"])
    return None


def _with_types_of(live: Any, value: Any) -> Any:
    """`value` with Counters where the live state has them, as MultiStepLR needs them."""
    if isinstance(live, Counter) and isinstance(value, dict):
        return Counter(value)
    if isinstance(live, dict) and isinstance(value, dict):
        return {key: _with_types_of(live.get(key), item) for key, item in value.items()}
    if isinstance(live, list) and isinstance(value, list) and len(live) == len(value):
        return [_with_types_of(one, item) for one, item in zip(live, value, strict=True)]
    return value


def _call(function: Callable[[Any], Any], value: Any) -> Callable[[], None]:
    def call() -> None:
        function(value)

    return call
