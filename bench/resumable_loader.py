"""What ResumableLoader adds to a DataLoader: microseconds a batch and a state_dict().

    python bench/resumable_loader.py

The ceiling is the plain DataLoader, in the same process, alternating with ours; medians of rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
from torch.utils.data import DataLoader, Dataset

from stillframe._loader.resumable_loader import ResumableLoader, index_stream, resumable_loader

BATCHES = 2000
ROUNDS = 9


class Constant(Dataset[int]):
    """Costs nothing to load."""

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> int:
        return index


def no_seeding(*_: object) -> None:
    """Stands for what seeds and puts back; a Mock would cost more than it."""


def batch_us(batches: Iterable[Any]) -> float:
    """Microseconds a batch, the start of the pass left out."""
    iterator = iter(batches)
    next(iterator)
    begin = time.perf_counter()
    count = sum(1 for _ in iterator)
    return (time.perf_counter() - begin) / count * 1e6


def call_us(call: Callable[[], object]) -> float:
    """Microseconds a call."""
    begin = time.perf_counter()
    for _ in range(1000):
        call()
    return (time.perf_counter() - begin) * 1e3


def main() -> None:
    torch.set_num_threads(1)
    data: DataLoader[int] = DataLoader(Constant(), shuffle=True, generator=torch.Generator())
    loader = ResumableLoader(data)
    plain, unseeded, seeded, state = [], [], [], []
    for _ in range(ROUNDS):
        plain.append(batch_us(data))
        seeded.append(batch_us(loader))
        nothing = mock.patch.multiple(
            resumable_loader, preserve_rng=no_seeding, seed_rng=no_seeding
        )
        with nothing, mock.patch.object(index_stream, "seed_rng", no_seeding):
            unseeded.append(batch_us(loader))
        next(iter(loader))
        state.append(call_us(loader.state_dict))
    for name, values in (
        ("plain DataLoader, a batch", plain),
        ("ResumableLoader without seeding", unseeded),
        ("ResumableLoader", seeded),
        ("state_dict()", state),
    ):
        middle = statistics.median(values)
        print(f"{name:32} {middle:7.2f} us  ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
