"""One pass over the sampler of a DataLoader, entered at any batch.

The sampler's draws from the process's global generators come from the pass's seed, so the training
sees nothing of them, and entering the pass again gives the same order. Generator objects of its own
(`_own_generators.py`) are set to the states of the pass's start, and the indices of the batches
that were handed out are drawn once more and dropped: nothing is loaded for them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.dataloader import _InfiniteConstantSampler

from stillframe._loader.batch_seeds import ENTRY, SAMPLER, SeededIndex, preserved_rng, seed_rng
from stillframe.errors import InvalidArgument

# These draw from the global generators for their first index, and never after.
_DRAWS_AT_FIRST = frozenset(
    {
        DistributedSampler,
        RandomSampler,
        SequentialSampler,
        SubsetRandomSampler,
        WeightedRandomSampler,
        _InfiniteConstantSampler,
    }
)


class IndexSource:
    """Stands in a DataLoader for its sampler; iterating it gives the stream of the current pass.

    Torch's iterator over workers calls iter() twice, and keeps this object from epoch to epoch.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.stream: IndexStream | None = None

    def __iter__(self) -> Iterator[Any]:
        assert self.stream is not None
        return self.stream

    def __len__(self) -> int:
        return len(self.sampler)


class IndexStream(Iterator[Any]):
    """Indices for each batch in turn.

    Args:
        sampler: the DataLoader's batch_sampler, or its sampler without automatic batching.
        seed: of the pass.
        in_process: whether batches are loaded in this process: each index is then the sampler's
            own, and the process is seeded for its batch when it is drawn. The caller puts the
            generators back after the fetch. Otherwise indices are `SeededIndex`.
    """

    def __init__(self, sampler: Any, seed: int, *, in_process: bool) -> None:
        self._sampler = sampler
        self._seed = seed
        self._in_process = in_process
        self._seeds_each = not _draws_at_first(sampler)
        self._is_first = True
        self._number = 0
        self._indices: Any = None
        self._stateful: Any = None
        self._states: dict[int, Any] = {}
        self.is_held = False

    def enter(self, batches: int, state: Any = None) -> None:
        """Go to batch `batches`; generators of the sampler's own must be set already.

        Args:
            batches: how many were handed out.
            state: of a sampler with state_dict(), as take_state() gave it; None draws again.

        Raises:
            InvalidArgument: the sampler ends before that.
        """
        with preserved_rng():
            seed_rng(self._seed, ENTRY)
            holder = _stateful_sampler(self._sampler)
            if state is not None and holder is not None:
                holder.load_state_dict(state)
            self._indices = iter(self._sampler)
            if hasattr(self._indices, "state_dict"):
                holder = self._indices
                if state is not None:
                    holder.load_state_dict(state)
            self._stateful = holder
            if holder is not None:
                self._states[batches - 1] = copy.deepcopy(holder.state_dict())
                if state is not None:
                    self._number = batches
                    return
            for number in range(batches):
                try:
                    self._draw()
                except StopIteration:
                    raise InvalidArgument(
                        f"the sampler ends after {number} batches, but {batches} were handed out "
                        "before the save: it, or what it draws from, is another one"
                    ) from None

    def drain(self) -> None:
        """Go to the end."""
        with preserved_rng():
            try:
                while True:
                    self._draw()
            except StopIteration:
                self._states.clear()

    @property
    def has_state(self) -> bool:
        """Whether the sampler, or its iterator, has a state_dict()."""
        return self._stateful is not None

    def take_state(self, number: int) -> Any:
        """The sampler's state right after it gave batch `number` (-1: at the start); once."""
        state = self._states[number]
        self._states = {ahead: kept for ahead, kept in self._states.items() if ahead > number}
        return state

    def __next__(self) -> Any:
        # Torch asks for batches ahead as soon as its workers run.
        if self.is_held:
            raise StopIteration
        number = self._number
        if self._in_process:
            index = self._draw()
            seed_rng(self._seed, number)
            return index
        if self._seeds_each or self._is_first:
            with preserved_rng():
                index = self._draw()
        else:
            index = self._draw()
        return SeededIndex(self._seed, number, index)

    def _draw(self) -> Any:
        number = self._number
        if self._seeds_each or self._is_first:
            seed_rng(self._seed, SAMPLER + number)
            self._is_first = False
        index = next(self._indices)
        self._number += 1
        if self._stateful is not None:
            # Some give their live state. Those ahead of the loop wait here to be handed out.
            self._states[number] = copy.deepcopy(self._stateful.state_dict())
        return index


def has_state(value: Any) -> bool:
    """Whether it can be saved and set again."""
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


def _draws_at_first(sampler: Any) -> bool:
    inner = sampler.sampler if type(sampler) is BatchSampler else sampler
    return type(inner) in _DRAWS_AT_FIRST


def _stateful_sampler(sampler: Any) -> Any:
    """The sampler, or the one in torch's BatchSampler, which keeps nothing between batches."""
    if has_state(sampler):
        return sampler
    if type(sampler) is BatchSampler and has_state(sampler.sampler):
        return sampler.sampler
    return None
