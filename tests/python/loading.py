"""Data, models and runs for the tests of ResumableLoader: augmentation by all three generators."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from stillframe._loader.resumable_loader import ResumableLoader

SAMPLES = 22
BATCH = 4


def augment(index: int) -> torch.Tensor:
    """[3]: the sample plus noise from torch, numpy and random."""
    noise = [float(torch.rand(())), float(np.random.rand()), random.random()]
    return torch.tensor(noise, dtype=torch.float64) + index


class Augmented(Dataset[torch.Tensor]):
    """Map-style; notes what was loaded in this process."""

    def __init__(self, length: int = SAMPLES) -> None:
        self.length = length
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        self.loaded.append(index)
        return augment(index)


class AugmentedBatches(Augmented):
    """Loads a whole batch by __getitems__."""

    def __getitem__(self, index: int) -> torch.Tensor:
        raise AssertionError("__getitems__ is there")

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        assert type(indices) is list
        return [augment(index) for index in indices]


class Stream(IterableDataset[torch.Tensor]):
    """Reads its worker's share in order, and begins at the beginning."""

    def __init__(self, length: int = SAMPLES) -> None:
        self.length = length

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for index in range(first, self.length, step):
            yield augment(index)


class StatefulStream(Stream):
    """Goes on where it was; each pass over it has another number."""

    def __init__(self, length: int = SAMPLES) -> None:
        super().__init__(length)
        self.next = 0
        self.passes = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        while first + self.next * step < self.length:
            index = first + self.next * step
            self.next += 1
            yield augment(index) + 1000 * self.passes
        self.next = 0
        self.passes += 1

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next, "passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next, self.passes = state["next"], state["passes"]


class ResettingStream(Stream):
    """Applies a loaded state at the next iter() only; its state at the end is the end."""

    def __init__(self, length: int = SAMPLES) -> None:
        super().__init__(length)
        self.position = 0
        self.start: int | None = None

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        start, self.start = self.start or 0, None
        for number, index in enumerate(range(first, self.length, step)):
            if number >= start:
                self.position = number + 1
                yield augment(index)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["position"]


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_digest() -> str:
    state = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    state.update(repr(random.getstate()).encode())
    state.update(repr(np.random.get_state()[1].tolist()).encode())
    state.update(repr(np.random.get_state()[2:]).encode())
    return state.hexdigest()


class Run:
    """A tiny training whose dropout draws from the global generator between batches."""

    def __init__(self, loader: DataLoader[Any], seed: int = 0) -> None:
        seed_all(seed)
        self.loader = ResumableLoader(loader)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 1)).double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.batches: list[tuple[int, Any]] = []
        self.step = 0

    def train_on(self, epoch: int, batch: torch.Tensor) -> None:
        self.batches.append((epoch, batch.tolist()))
        self.optimizer.zero_grad()
        scale = random.random() + float(np.random.rand())
        loss = self.model(batch.reshape(-1, 3)).square().mean() * scale
        loss.backward()
        self.optimizer.step()
        self.step += 1

    def digest(self) -> str:
        weights = [parameter.tolist() for parameter in self.model.parameters()]
        return hashlib.sha256(f"{weights} {rng_digest()}".encode()).hexdigest()
