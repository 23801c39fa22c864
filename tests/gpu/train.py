"""A training on a GPU, or on the CPU to try it out, that may be killed at any instant.

A bf16 model with dropout and BatchNorm, whose optimizer has fp32 copies of its parameters: the
model is written after step(), so it is captured at once, the copies and their moments lazily.

    train.py RUN --steps N --device cuda|cpu --journal FILE [--save-every N] [--lane LANE]

Prints `step N` for each step. FILE gets a line of JSON for each resume and, at the end, one with a
hash of all that a resume must bring back and of every loss since the first step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

# cuBLAS gives the same bits twice only with a workspace of its own.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from torch import nn

import stillframe.torch as stillframe

WIDTHS = {"cuda": 1024, "cpu": 96}
BATCH = 256


class Trained:
    """The model, the fp32 copies, their optimizer and scheduler."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(3)
        self.device = device
        self.width = width = WIDTHS[device]
        layers: list[nn.Module] = []
        for _ in range(4):
            layers += [
                nn.Linear(width, width),
                nn.BatchNorm1d(width),
                nn.GELU(),
                nn.Dropout(0.1),
            ]
        self.model = nn.Sequential(*layers).to(device=device, dtype=torch.bfloat16)
        self.copies = [one.detach().float() for one in self.model.parameters()]
        self.optimizer = torch.optim.AdamW(self.copies, lr=1e-3, fused=device == "cuda")
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 7, gamma=0.9)

    def step(self) -> float:
        """One step on data that the generators decide; returns the loss."""
        data = torch.randn(BATCH, self.width, device=self.device, dtype=torch.bfloat16)
        loss = self.model(data).float().square().mean()
        loss.backward()
        for copy, parameter in zip(self.copies, self.model.parameters(), strict=True):
            assert parameter.grad is not None
            copy.grad = parameter.grad.float()
            parameter.grad = None
        self.optimizer.step()
        self.scheduler.step()
        with torch.no_grad():
            for copy, parameter in zip(self.copies, self.model.parameters(), strict=True):
                parameter.copy_(copy)
        return loss.item()

    def digest(self) -> str:
        """A hash over weights, buffers, copies, moments, learning rate and generators."""
        state = hashlib.sha256()
        tensors = [*self.model.state_dict().values(), *self.copies]
        for copy in self.copies:
            tensors += [one for _, one in sorted(self.optimizer.state[copy].items())]
        for tensor in tensors:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            state.update(flat.view(torch.uint8).numpy().tobytes())
        state.update(repr(self.optimizer.param_groups[0]["lr"]).encode())
        state.update(torch.get_rng_state().numpy().tobytes())
        if self.device == "cuda":
            state.update(torch.cuda.get_rng_state().numpy().tobytes())
        return state.hexdigest()


def main() -> None:
    """Train, from where the run's newest checkpoint is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--save-every", type=int, default=3)
    parser.add_argument("--lane", choices=("auto", "pinned", "hbm", "ipc"), default="auto")
    arguments = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    trained = Trained(arguments.device)
    checkpointer = stillframe.Checkpointer(
        arguments.run,
        model=trained.model,
        optimizer=trained.optimizer,
        scheduler=trained.scheduler,
        keep_last=2,
        check="full",
        lane=arguments.lane,
    )
    restored = checkpointer.resume()
    losses: list[str] = restored.extra["losses"] if restored else []
    first = restored.step + 1 if restored else 0

    def note(**entry: Any) -> None:
        with arguments.journal.open("a") as journal:
            journal.write(json.dumps(entry) + "\n")

    note(kind="resume", step=first, source=restored.source if restored else None)
    for step in range(first, arguments.steps):
        losses.append(trained.step().hex())
        if step % arguments.save_every == 0:
            checkpointer.save(step, extra={"losses": losses})
        print(f"step {step}", flush=True)
    note(
        kind="end",
        digest=trained.digest(),
        losses=hashlib.sha256("".join(losses).encode()).hexdigest(),
        lane=checkpointer.status["lane"],
        lane_reason=checkpointer.status["lane_reason"],
    )
    checkpointer.close()


if __name__ == "__main__":
    main()
