"""A small training with all that must survive a kill: dropout, BatchNorm, a scheduler, RNGs."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import stillframe.torch as stillframe


@dataclasses.dataclass
class Training:
    """Model, optimizer, scheduler, and the steps done on random data."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    losses: list[float] = dataclasses.field(default_factory=list)

    def step(self) -> None:
        """One step on a batch that all three random number generators decide."""
        scale = random.random() + float(np.random.rand())
        batch = torch.randn(16, 12) * scale
        self.optimizer.zero_grad()
        loss = self.model(batch).square().mean()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.losses.append(loss.item())

    def checkpointer(self, directory: Path, **options: Any) -> stillframe.Checkpointer:
        """A Checkpointer of all of it."""
        return stillframe.Checkpointer(
            directory,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            **options,
        )

    def digest(self) -> str:
        """A hash over all that a resume must bring back, bit for bit."""
        state = hashlib.sha256()
        for tensor in self.model.state_dict().values():
            state.update(tensor.numpy().tobytes())
        for group in self.optimizer.state_dict()["state"].values():
            for key in sorted(group):
                state.update(torch.as_tensor(group[key]).numpy().tobytes())
        state.update(repr(self.optimizer.param_groups[0]["lr"]).encode())
        state.update(repr(sorted(self.scheduler.state_dict().items(), key=str)).encode())
        state.update(torch.get_rng_state().numpy().tobytes())
        state.update(repr(random.getstate()).encode())
        state.update(repr(np.random.get_state()).encode())
        return state.hexdigest()


def make(seed: int = 0, width: int = 32) -> Training:
    """A fresh training; equal seeds give equal ones."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(12, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 4)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 6, 9], gamma=0.5)
    return Training(model, optimizer, scheduler)
