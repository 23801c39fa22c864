"""Where a ResumableLoader is, and the DataLoader that this is a place in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
)

from stillframe._loader.index_stream import has_state
from stillframe._loader.own_generators import find_generators
from stillframe.errors import InvalidArgument

_VERSION = 1
# What decides the order besides the generators, in torch's own samplers.
_ORDER_ATTRIBUTES: dict[type, tuple[str, ...]] = {
    DistributedSampler: ("num_replicas", "rank", "seed", "shuffle", "drop_last"),
    RandomSampler: ("replacement", "num_samples"),
    WeightedRandomSampler: ("replacement", "num_samples"),
}


@dataclasses.dataclass
class Position:
    """Where a pass is, and what it takes to enter it there again.

    Attributes:
        epoch: its index.
        seed: of the pass; None ahead of its start.
        batches: how many the loop has been given.
        is_finished: the loop has seen its end: the epoch to enter is the next one.
        starts: states of the loader's own generators at the start, by path.
        sampler_epoch: what set_epoch() of the sampler was given, if it keeps that.
        sampler: state after the last batch given, of a sampler that has one.
        dataset: where a dataset that has a state is after the last batch given, as place_after()
            says it, by worker; 0 is the main process without workers.
        last_worker: which one the last batch came from, if the dataset has a state.
    """

    epoch: int = 0
    seed: int | None = None
    batches: int = 0
    is_finished: bool = False
    starts: dict[str, Any] = dataclasses.field(default_factory=dict)
    sampler_epoch: int | None = None
    sampler: Any = None
    dataset: dict[int, Any] = dataclasses.field(default_factory=dict)
    last_worker: int = -1

    @property
    def is_within(self) -> bool:
        """Whether a pass goes on from here, rather than starts."""
        return self.seed is not None and not self.is_finished


@dataclasses.dataclass
class SavedPosition:
    """What state_dict() gives: a position, and what surrounds it.

    Attributes:
        position: of the loop.
        generators: the loader's own generators' states of then, by path.
        shape: shape_of() the loader of then.
        batches_ahead: how many batches the workers were given ahead of the loop.
    """

    position: Position
    generators: dict[str, Any]
    shape: dict[str, Any]
    batches_ahead: int

    def to_state(self) -> dict[str, Any]:
        """As plain values and tensors, not changed by what the loader does next."""
        position = dict(vars(self.position))
        position["dataset"] = self.position.dataset.copy()
        return {
            "version": _VERSION,
            "position": position,
            "generators": self.generators,
            "shape": self.shape,
            "batches_ahead": self.batches_ahead,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> SavedPosition:
        """Read what to_state() gave.

        Raises:
            InvalidArgument: it is something else.
        """
        try:
            version = state["version"]
            saved = cls(
                position=Position(**state["position"]),
                generators=dict(state["generators"]),
                shape=dict(state["shape"]),
                batches_ahead=int(state["batches_ahead"]),
            )
            is_sound = saved.position.epoch >= 0 and saved.position.batches >= 0
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidArgument(
                f"this is not the state of a ResumableLoader: {type(error).__name__}: {error}"
            ) from error
        if version != _VERSION or not is_sound:
            position = saved.position
            raise InvalidArgument(
                f"this is not the state of a ResumableLoader of this version: version {version!r}, "
                f"epoch {position.epoch}, {position.batches} batches"
            )
        saved.position.dataset = dict(saved.position.dataset)
        return saved

    def check_fits(self, loader: DataLoader[Any]) -> None:
        """Check that the middle of an epoch of then is the same place in this loader.

        Raises:
            InvalidArgument: it is not; all that differs is listed.
        """
        if not self.position.is_within:
            return
        now = shape_of(loader)
        differences = [
            f"{name}: {self.shape.get(name)!r} in the checkpoint, {now.get(name)!r} now"
            for name in dict.fromkeys((*self.shape, *now))
            if self.shape.get(name) != now.get(name)
        ]
        if differences:
            listed = "\n  ".join(differences)
            raise InvalidArgument(
                f"the checkpoint is in the middle of epoch {self.position.epoch}, after "
                f"{self.position.batches} batches, of a DataLoader that differs:\n  {listed}\n"
                "Resume with the same, or leave the loader's state out and call set_epoch()"
            )


def shape_of(loader: DataLoader[Any]) -> dict[str, Any]:
    """What must be equal for a position to mean the same, as plain values by name."""
    sampler, batch_sampler = loader.sampler, loader.batch_sampler
    is_iterable = isinstance(loader.dataset, IterableDataset)
    shape: dict[str, Any] = {
        "dataset length": None if is_iterable else length_of(loader.dataset),
        "batch_size": loader.batch_size or getattr(batch_sampler, "batch_size", None),
        "drop_last": loader.drop_last or getattr(batch_sampler, "drop_last", False),
        "sampler": type_name(sampler),
        "batch_sampler": type_name(batch_sampler),
        "batches in an epoch": None if is_iterable else length_of(loader),
        "generators": sorted(find_generators(loader)),
    }
    inner = getattr(batch_sampler, "sampler", sampler)
    for kind, names in _ORDER_ATTRIBUTES.items():
        if isinstance(inner, kind):
            shape.update({f"sampler.{name}": getattr(inner, name) for name in names})
    if is_iterable or has_state(loader.dataset):
        # Each worker has a part of the data, or a state of its own.
        shape["num_workers"] = loader.num_workers
        shape["dataset has state_dict()"] = has_state(loader.dataset)
    return shape


def length_of(value: Any) -> int | None:
    """len(), or None where there is none."""
    try:
        return len(value)
    except (TypeError, NotImplementedError):
        return None


def type_name(value: Any) -> str:
    """The type's name with its module, for people and for comparing."""
    return f"{type(value).__module__}.{type(value).__qualname__}"
