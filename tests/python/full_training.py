"""A training with everything that a Checkpointer takes, and as its own process.

    full_training.py DIRECTORY STEPS [STOP]

A compiled, DDP-wrapped network in bfloat16 with tied weights and float32 moments; an EMA of it, a
GradScaler, a scheduler, three generators beside the global ones, a data order with a position, a
meter with a tensor. Trains to STEPS by step() with every_steps=2; exits at STOP without a word, as
after a kill. Prints the digest at the end.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import stillframe.torch as stillframe


class Tied(nn.Module):
    """A tiny language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.body = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.drop(torch.tanh(self.body(self.embedding(tokens)))))
        return result


class FloatMomentum(torch.optim.Optimizer):
    """Momentum in float32 for parameters of any dtype, as mixed-precision optimizers keep it."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": 0.9})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["moment"] = torch.zeros_like(parameter, dtype=torch.float32)
                    state["steps"] = 0
                state["steps"] += 1
                state["moment"].mul_(group["momentum"]).add_(parameter.grad.float())
                parameter.sub_((group["lr"] * state["moment"]).to(parameter.dtype))


class Order:
    """A shuffled data order with a position, whose state is a tensor and an integer."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.order = torch.randperm(12, generator=generator)
        self.position = 0
        self.epoch = 0

    def next(self) -> torch.Tensor:
        batch = self.order[self.position : self.position + 4]
        self.position += 4
        if self.position == 12:
            self.order = torch.randperm(12, generator=self.generator)
            self.position = 0
            self.epoch += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "position": self.position, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.position = state["order"].clone(), state["position"]
        self.epoch = state["epoch"]


class Meter:
    """A running mean in float64, and the parameters' norm through a view of them."""

    def __init__(self, watched: torch.Tensor) -> None:
        self.total = torch.zeros(2, dtype=torch.float64)
        self.watched = watched

    def add(self, loss: float) -> None:
        self.total += torch.tensor([loss, 1.0], dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "watched": self.watched.detach()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state["total"]
        self.loaded = state["watched"]


class Full:
    """All of it, from one seed."""

    def __init__(self, seed: int, *, wraps: bool = True) -> None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.net = Tied().to(torch.bfloat16)
        self.model: nn.Module = self.net
        if wraps:
            self.model = torch.compile(DistributedDataParallel(self.net), backend="eager")
        self.optimizer = FloatMomentum(self.net.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=100)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        self.ema = torch.optim.swa_utils.AveragedModel(
            self.net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        self.torch_generator = torch.Generator().manual_seed(seed)
        self.numpy_generator = np.random.default_rng(seed)
        self.python_generator = random.Random(seed)
        self.order = Order(torch.Generator().manual_seed(seed + 1))
        self.meter = Meter(self.net.body.weight)
        self.losses: list[float] = []

    def members(self) -> dict[str, Any]:
        """The arguments of a Checkpointer."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "ema": self.ema,
            "generators": {
                "torch": self.torch_generator,
                "numpy": self.numpy_generator,
                "python": self.python_generator,
                "order": self.order.generator,
            },
            "loader": self.order,
            "state": {"meter": self.meter},
        }

    def step(self) -> None:
        """One step that draws from every generator."""
        shift = int(self.numpy_generator.integers(4)) + self.python_generator.randrange(4)
        noise = torch.rand((), generator=self.torch_generator).item() + random.random()
        noise += float(np.random.rand())
        tokens = (self.order.next() + shift) % 16
        logits = self.model(tokens).float()
        loss = nn.functional.cross_entropy(logits, (tokens + 1) % 16) * (1 + noise)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.ema.update_parameters(self.net)
        self.meter.add(loss.item())
        self.losses.append(loss.item())

    def digest(self) -> str:
        """A hash over everything."""
        state = hashlib.sha256()

        def add(value: Any) -> None:
            if isinstance(value, torch.Tensor):
                state.update(f"{value.dtype}{tuple(value.shape)}".encode())
                state.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
            elif isinstance(value, dict):
                for key in sorted(value, key=str):
                    state.update(str(key).encode())
                    add(value[key])
            elif isinstance(value, list | tuple):
                for item in value:
                    add(item)
            else:
                state.update(repr(value).encode())

        schedule = {k: v for k, v in self.scheduler.state_dict().items() if "anneal" not in k}
        add([self.net.state_dict(), self.optimizer.state_dict(), schedule])
        add([self.scaler.state_dict(), self.ema.state_dict(), self.order.state_dict()])
        add([self.torch_generator.get_state(), self.order.generator.get_state()])
        add([self.numpy_generator.bit_generator.state, self.python_generator.getstate()])
        add([torch.get_rng_state(), random.getstate(), np.random.get_state()])
        add(self.meter.state_dict())
        return state.hexdigest()


def join_alone() -> None:
    """A process group of one."""
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def main() -> None:
    directory, steps = Path(sys.argv[1]), int(sys.argv[2])
    stop = int(sys.argv[3]) if len(sys.argv) > 3 else None
    torch.set_num_threads(1)
    join_alone()
    # Another seed each time: what the checkpoint lacks would differ.
    full = Full(seed=3 if stop is None else 0)
    checkpointer = stillframe.Checkpointer(
        directory, **full.members(), every_steps=2, check="full", signals=()
    )
    restored = checkpointer.resume()
    print("resumed", restored.step if restored else None, flush=True)
    for step in range(restored.step + 1 if restored else 0, steps):
        full.step()
        ticket = checkpointer.step(step, extra={"loss": full.losses[-1]})
        if ticket is not None:
            ticket.wait(timeout=30)
        if step == stop:
            os._exit(9)
    checkpointer.close()
    print("digest", full.digest(), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
