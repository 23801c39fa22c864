"""ResumableLoader: a DataLoader whose position is part of the checkpoint.

How it is exact:

- The position is the number of batches handed to the loop, and the pass's seed. What workers have
  read ahead does not count; they read it again.
- Each pass takes one seed from torch's global generator (from `generator=` if the DataLoader has
  one). The order of the sampler, the seeds of workers and of each batch follow from it
  (`_index_stream.py`, `_batch_seeds.py`). Random augmentation by torch, numpy and random gives a
  batch the same values with any number of workers, 0 included, and wherever the pass was entered.
- Between batches the global generators are the training's alone: loading never moves them.

For who saves it (the Checkpointer):

- state_dict(): in the thread of the loop, when the global generators' states are taken, with no
  batch between the two. The position is then right even with workers ahead.
- load_state_dict(): before or after the global generators are restored; it neither draws from them
  nor sets them. It sets generators that the DataLoader or its sampler hold; restoring these
  elsewhere too, before or after, does no harm.
- The first `for` after it: after the global generators are restored. In the middle of an epoch it
  leaves them as they are; at the start of one it draws the pass's seed from them.

What it cannot see: generators that a dataset keeps for itself go on in each process as they did
without Stillframe, unless the dataset has state_dict() and load_state_dict(); CUDA's generators,
which only a dataset in the main process can use, go on with the training's.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset

from stillframe._loader.batch_seeds import ENTRY, preserve_rng, preserved_rng, seed_rng
from stillframe._loader.dataset_state import (
    CollateWithState,
    LoadInWorker,
    begin_at_worker,
    load_place,
    place_after,
    place_at_end,
)
from stillframe._loader.index_stream import IndexSource, IndexStream, has_state
from stillframe._loader.own_generators import find_generators, get_state, set_state
from stillframe._loader.position import Position, SavedPosition, shape_of, type_name
from stillframe.errors import InvalidArgument, StillframeWarning

_log = logging.getLogger("stillframe")

_Batch = TypeVar("_Batch")


class ResumableLoader(Generic[_Batch]):
    """A DataLoader that goes on where the checkpoint was taken, to the bit.

        loader = ResumableLoader(DataLoader(dataset, batch_size=32, shuffle=True, num_workers=2))
        for epoch in range(loader.epoch, epochs):
            for batch in loader:
                ...

    The first `for` after load_state_dict() gives the rest of its epoch; after a save at an epoch's
    last batch that is nothing, and what the training does at the end of the epoch follows. A new
    `for` after a `break` is a new pass of the same epoch, from its beginning, in a new order, as
    with the DataLoader itself; state_dict() after the `break` still holds the place of the break.
    Loops that end every epoch by `break` say which epoch follows by set_epoch().

    Any attribute that is not named here is the DataLoader's. Each pass reads the DataLoader's
    attributes anew; it is never changed. With an IterableDataset without state_dict(), the batches
    that were handed out are read again and dropped, which is warned of.

    Args:
        loader: the DataLoader. Workers must give batches in order.

    Raises:
        InvalidArgument: it is not a DataLoader, has `in_order=False` with workers, or keeps its own
            position.
    """

    def __init__(self, loader: DataLoader[_Batch]) -> None:
        if not isinstance(loader, DataLoader):
            raise InvalidArgument(f"loader is a {type_name(loader)}, not a DataLoader")
        if has_state(loader):
            raise InvalidArgument(
                f"{type_name(loader)} keeps its own position: save its state_dict(), or pass a "
                "plain DataLoader"
            )
        if loader.num_workers > 0 and not loader.in_order:
            raise InvalidArgument(
                "in_order=False gives batches as workers finish them, in no order that can be "
                "resumed; pass in_order=True"
            )
        self._loader = loader
        sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        self._source = IndexSource(sampler)
        self._is_iterable = isinstance(loader.dataset, IterableDataset)
        self._has_dataset_state = has_state(loader.dataset)
        self._position = Position()
        # Until the next `for`.
        self._restored: SavedPosition | None = None
        self._loads_dataset = False
        # torch's iterator, kept from pass to pass with persistent_workers.
        self._workers: Any = None
        self._shape: dict[str, Any] | None = None
        self._passes = 0
        self._has_warned = False

    @property
    def epoch(self) -> int:
        """The epoch that is being given, or that the next `for` gives; counted from 0."""
        position = self._current
        return position.epoch + 1 if position.is_finished else position.epoch

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next `for` gives, and tell the sampler and the dataset if they ask.

        The epoch in which the loader is leaves everything as it is, so that calling this ahead of
        each `for` is right after a resume too. Another one starts at its beginning.

        Args:
            epoch: 0 or more.

        Raises:
            InvalidArgument: it is negative.
        """
        if epoch < 0:
            raise InvalidArgument(f"epoch is {epoch}; it must be 0 or more")
        if epoch != self.epoch:
            self._restored = None
            self._position = Position(epoch=epoch)
        loader = self._loader
        holders: tuple[Any, ...] = (loader.batch_sampler, loader.sampler, loader.dataset)
        for holder in holders:
            if hasattr(holder, "set_epoch"):
                holder.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        # Not there yet while copy or pickle makes one.
        if name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    # --- A pass -----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[_Batch]:
        """Start a pass, or go on with the restored one.

        Raises:
            InvalidArgument: the restored position does not exist in what the sampler, or the
                dataset that must be read again, gives now.
        """
        restored = self._restored
        if restored is not None and not restored.position.is_within:
            self._end_finished(restored.position)
            restored = None
        if restored is None:
            return self._enter(self._fresh_position(), None)
        self._apply_starts(restored.position)
        # Unchanged if that fails.
        position = dataclasses.replace(restored.position, dataset=restored.position.dataset.copy())
        one = self._enter(position, restored)
        self._restored = None
        return one

    def _enter(self, position: Position, restored: SavedPosition | None) -> _Pass[_Batch]:
        assert position.seed is not None
        reads_again = self._is_iterable and position.batches > 0 and not position.dataset
        given, position.batches = position.batches, 0 if reads_again else position.batches
        stream = IndexStream(
            self._source.sampler, position.seed, in_process=self._loader.num_workers == 0
        )
        stream.enter(position.batches, position.sampler)
        if stream.has_state:
            position.sampler = stream.take_state(position.batches - 1)
        batches = self._start(stream, position)
        if restored is not None and restored.batches_ahead == self._batches_ahead:
            # As many indices are drawn as were then, so this moves nothing but others' draws.
            for path, generator in find_generators(self._loader).items():
                set_state(generator, restored.generators[path])
        self._shape = shape_of(self._loader)
        self._position = position
        self._passes += 1
        one = _Pass(self, position, stream, batches)
        if reads_again:
            self._read_again(one, given)
        return one

    def _fresh_position(self) -> Position:
        loader = self._loader
        drawn = torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
        return Position(
            epoch=self.epoch,
            seed=int(drawn.item()),
            starts=self._generator_states(),
            sampler_epoch=_sampler_epoch(loader),
            dataset=self._dataset_at_start(),
        )

    def _dataset_at_start(self) -> dict[int, Any]:
        """Where the pass before left the dataset, or each persistent worker its own."""
        is_kept = self._loader.num_workers == 0 or self._loader.persistent_workers
        if not (is_kept and self._position.is_finished):
            return {}
        return {worker: place_at_end(place) for worker, place in self._position.dataset.items()}

    def _apply_starts(self, position: Position) -> None:
        for path, generator in find_generators(self._loader).items():
            set_state(generator, position.starts[path])
        if position.sampler_epoch is not None:
            _set_sampler_epoch(self._loader, position.sampler_epoch)

    def _start(self, stream: IndexStream, position: Position) -> Any:
        """Torch's iterator over the stream; the dataset goes to its place of the position."""
        loader = copy.copy(self._loader)
        fields = vars(loader)
        assert position.seed is not None
        # base_seed, which torch draws when it starts workers, must move no generator of the user's.
        fields["generator"] = torch.Generator().manual_seed(position.seed)
        self._source.stream = stream
        fields["sampler" if loader.batch_sampler is None else "batch_sampler"] = self._source
        places = position.dataset if self._loads_dataset else {}
        if self._has_dataset_state:
            fields["collate_fn"] = CollateWithState(
                loader.collate_fn, loader.batch_size if self._is_iterable else None, loader.dataset
            )
        if places and loader.num_workers > 0:
            fields["worker_init_fn"] = LoadInWorker(places, loader.worker_init_fn)
            stream.is_held = position.last_worker >= 0
        elif places:
            with preserved_rng():
                load_place(loader.dataset, places[0])
        fields["_iterator"] = self._workers
        with preserved_rng():
            seed_rng(position.seed, ENTRY)
            batches = iter(loader)
            if stream.is_held:
                stream.is_held = False
                begin_at_worker(batches, position.last_worker + 1)
        self._loads_dataset = False
        if loader.num_workers > 0 and loader.persistent_workers:
            self._workers = batches
        return batches

    def _end_finished(self, position: Position) -> None:
        """Bring a sampler that has a state to the end of the epoch that the save followed."""
        if position.sampler is not None and position.seed is not None:
            states, sampler_epoch = self._generator_states(), _sampler_epoch(self._loader)
            self._apply_starts(position)
            stream = IndexStream(self._source.sampler, position.seed, in_process=False)
            stream.enter(position.batches, position.sampler)
            stream.drain()
            for path, generator in find_generators(self._loader).items():
                set_state(generator, states[path])
            if sampler_epoch is not None:
                _set_sampler_epoch(self._loader, sampler_epoch)
        self._restored = None
        self._position = position

    def _read_again(self, one: _Pass[_Batch], count: int) -> None:
        if not self._has_warned:
            self._has_warned = True
            text = (
                f"{type_name(self._loader.dataset)} has no state_dict() and load_state_dict(): "
                f"{count} batches are read again and dropped to get to the place of the checkpoint"
            )
            _log.warning("%s", text)
            # The `for`, above __iter__() and _enter().
            warnings.warn(text, StillframeWarning, stacklevel=4)
        for number in range(count):
            try:
                next(one)
            except StopIteration:
                raise InvalidArgument(
                    f"the dataset ends after {number} batches, but {count} were handed out before "
                    "the save: it is another one"
                ) from None

    # --- State ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position between the batch handed out last and the next, as plain values and tensors.

        Call it in the loop's thread when the states of the global generators are taken.

        Returns:
            None, bool, int, str, lists, tuples, dicts and 1-d uint8 CPU tensors (states of
            torch.Generators), and what the sampler's and the dataset's own state_dict() give.
        """
        if self._restored is not None:
            return self._restored.to_state()
        if self._shape is None:
            self._shape = shape_of(self._loader)
        saved = SavedPosition(
            self._position, self._generator_states(), self._shape, self._batches_ahead
        )
        return saved.to_state()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take a position back; the next `for` goes on there.

        May come before or after the global generators are restored, which it leaves alone.

        Args:
            state_dict: what state_dict() gave.

        Raises:
            InvalidArgument: it is no such state, or is in the middle of an epoch of a DataLoader
                that differs in length, batching, sampler or, for a dataset that is iterated or has
                a state, workers: all differences are listed. The loader is as before.
        """
        saved = SavedPosition.from_state(state_dict)
        saved.check_fits(self._loader)
        for path, generator in find_generators(self._loader).items():
            if path in saved.generators:
                set_state(generator, saved.generators[path])
        self._workers = None
        self._restored = saved
        self._loads_dataset = self._has_dataset_state

    @property
    def _current(self) -> Position:
        return self._restored.position if self._restored is not None else self._position

    @property
    def _batches_ahead(self) -> int:
        return self._loader.num_workers * (self._loader.prefetch_factor or 0)

    def _generator_states(self) -> dict[str, Any]:
        return {path: get_state(one) for path, one in find_generators(self._loader).items()}


class _Pass(Iterator[_Batch]):
    """One pass; counts what it gives."""

    def __init__(
        self, loader: ResumableLoader[_Batch], position: Position, stream: IndexStream, batches: Any
    ) -> None:
        self._loader = loader
        self._position = position
        self._stream = stream
        self._batches = batches
        self._ordinal = loader._passes
        self._has_dataset_state = loader._has_dataset_state
        self._in_process = loader._loader.num_workers == 0
        self._failed = 0

    def __len__(self) -> int:
        return len(self._loader)

    def __next__(self) -> _Batch:
        loader, position = self._loader, self._position
        if self._ordinal != loader._passes and loader._workers is not None:
            raise InvalidArgument(
                "another pass was started, and persistent_workers serve one at a time"
            )
        restore = preserve_rng() if self._in_process else None
        try:
            batch = next(self._batches)
        except StopIteration:
            position.is_finished = True
            loader._position = position
            raise
        except Exception:
            # Counts only if the loop goes on without this batch: else it is tried again.
            self._failed += 1
            raise
        finally:
            if restore is not None:
                restore()
        if self._has_dataset_state:
            batch, worker, state, too_few = batch
            position.last_worker = worker
            position.dataset[worker] = place_after(position.dataset.get(worker), state, too_few)
        position.batches += 1 + self._failed
        self._failed = 0
        if self._stream.has_state:
            position.sampler = self._stream.take_state(position.batches - 1)
        loader._position = position
        return batch  # type: ignore[no-any-return]


def _epoch_holder(loader: DataLoader[Any]) -> Any:
    """The sampler that keeps what its set_epoch() was given, such as a DistributedSampler."""
    inner = getattr(loader.batch_sampler, "sampler", None)
    for holder in (loader.batch_sampler, loader.sampler, inner):
        if hasattr(holder, "set_epoch") and isinstance(getattr(holder, "epoch", None), int):
            return holder
    return None


def _sampler_epoch(loader: DataLoader[Any]) -> int | None:
    holder = _epoch_holder(loader)
    return None if holder is None else int(holder.epoch)


def _set_sampler_epoch(loader: DataLoader[Any], epoch: int) -> None:
    holder = _epoch_holder(loader)
    if holder is not None:
        holder.set_epoch(epoch)
