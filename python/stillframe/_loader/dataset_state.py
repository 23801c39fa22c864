"""The position of a dataset that has state_dict() and load_state_dict(), wherever it is iterated.

With workers each has its own copy of the dataset. Its state travels with every batch, so that what
a worker has read ahead is not in the state of a batch that was handed out before.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info


class CollateWithState:
    """collate_fn: gives (the user's result, the worker, its dataset's state, samples if too few).

    Args:
        collate: the user's.
        batch_size: samples in a full batch of a dataset that is iterated, else None. Where fewer
            come, the dataset has noticed its end, and its state may be the next pass's already.
    """

    def __init__(self, collate: Callable[[Any], Any], batch_size: int | None, dataset: Any) -> None:
        self._collate = collate
        self._batch_size = batch_size
        self._dataset = dataset

    def __call__(self, samples: Any) -> tuple[Any, int, Any, int]:
        too_few = 0
        if self._batch_size is not None and len(samples) < self._batch_size:
            too_few = len(samples)
        batch = self._collate(samples)
        info = get_worker_info()
        if info is None:
            return batch, 0, copy_state(self._dataset), too_few
        return batch, info.id, copy_state(info.dataset), too_few

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker has the dataset already.
        return {**vars(self), "_dataset": None}


def place_after(before: dict[str, Any] | None, state: Any, too_few: int) -> dict[str, Any]:
    """Where a dataset is after a batch, as plain values for load_place().

    From "state" (None: as it was made) on, the end of "ended_passes" passes was seen, and then
    "samples" samples were given.

    Args:
        before: where it was ahead of that batch; None at the start of the first pass.
        state: its state after it.
        too_few: how many samples the batch had, if it was not a full one, else 0.
    """
    if too_few == 0:
        return {"state": state, "ended_passes": 0, "samples": 0}
    before = before or {"state": None, "ended_passes": 0}
    return {**before, "samples": too_few}


def place_at_end(place: dict[str, Any]) -> dict[str, Any]:
    """Where it is when the pass that `place` is in has ended."""
    return {"state": place["state"], "ended_passes": place["ended_passes"] + 1, "samples": 0}


class LoadInWorker:
    """worker_init_fn that ends with bringing the worker's dataset to its place.

    Args:
        places: by worker, as place_after() gave them.
        init: the user's, which runs first.
    """

    def __init__(self, places: dict[int, Any], init: Callable[[int], Any] | None) -> None:
        self._places = places
        self._init = init

    def __call__(self, worker: int) -> None:
        if self._init is not None:
            self._init(worker)
        info = get_worker_info()
        assert info is not None
        if worker in self._places:
            load_place(info.dataset, self._places[worker])


def copy_state(dataset: Any) -> Any:
    """The dataset's state of now; some give their live one."""
    return copy.deepcopy(dataset.state_dict())


def load_place(dataset: Any, place: dict[str, Any]) -> None:
    """Bring the dataset to where it was after the last batch that was handed out.

    The end of a pass (what is left is nothing, or what drop_last drops) is read, so that the
    dataset itself notices it as it did before the save.
    """
    if place["state"] is not None:
        dataset.load_state_dict(copy.deepcopy(place["state"]))
    if not isinstance(dataset, IterableDataset):
        return
    for _ in range(place["ended_passes"]):
        for _ in dataset:
            pass
    if place["samples"]:
        # At its last sample, with its end not noticed yet: the next pass over it does.
        samples: Any = iter(dataset)
        for _ in itertools.islice(samples, place["samples"]):
            pass
        stateful: Any = dataset
        stateful.load_state_dict(copy_state(dataset))


def begin_at_worker(batches: Any, worker: int) -> None:
    """Let torch's iterator, whose index stream was held, ask the workers in turn from `worker` on.

    The next batch is then the next of the worker whose turn it is. Uses the iterator's private
    names (as of torch 2.6 to 2.13): it has no public way to begin at another than worker 0.
    """
    count = batches._num_workers
    turns = [(worker + index) % count for index in range(count)]
    batches._worker_queue_idx_cycle = itertools.cycle(turns)
    for _ in range(batches._prefetch_factor * count):
        batches._try_put_index()
