"""Trains a classifier of handwritten digits that may be killed at any instant and goes on.

    python examples/digits.py checkpoints/digits        # again after a kill: it resumes
    python examples/digits.py checkpoints/large --members 8 --width 1660   # 264 MiB of state
    python examples/digits.py --no-checkpoints          # the same training, uninterrupted

Dropout and the shuffled order of the data draw random numbers, Adam and the scheduler have state:
all of it must come back for the result to be the same, bit for bit. --journal writes what
scripts/demo compares.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn

import stillframe.torch as stillframe


def train(arguments: argparse.Namespace, journal: Journal) -> None:
    """The training loop, with a checkpoint every few steps."""
    torch.manual_seed(0)
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    model = nn.ModuleList(perceptron(arguments.width) for _ in range(arguments.members))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    order = torch.empty(0)
    first = 0

    if not arguments.no_checkpoints:
        checkpointer = stillframe.Checkpointer(
            arguments.directory, model=model, optimizer=optimizer, scheduler=scheduler, keep_last=3
        )
        restored = checkpointer.resume()
        if restored:
            first = restored.step + 1
            order = restored.extra["order"]
        journal.resumed(restored)

    size = arguments.batch
    batches_per_epoch = len(images) // size
    for step in range(first, arguments.steps):
        place = step % batches_per_epoch
        if place == 0:
            order = torch.randperm(len(images))
        batch = order[place * size : (place + 1) * size]
        optimizer.zero_grad()
        member = model[step % len(model)]
        loss = nn.functional.cross_entropy(member(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        scheduler.step()
        journal.stepped(step, loss.item())
        if step % arguments.save_every == 0 and not arguments.no_checkpoints:
            ticket = checkpointer.save(step, metrics={"loss": loss}, extra={"order": order})
            journal.saving(ticket)

    if not arguments.no_checkpoints:
        checkpointer.close()
    journal.finished(model, optimizer, scheduler)
    model.eval()
    votes = torch.stack([member(images).softmax(1) for member in model]).sum(0)
    accuracy = (votes.argmax(1) == labels).float().mean().item()
    print(f"accuracy on the digits it saw: {accuracy:.1%}", flush=True)


def perceptron(width: int) -> nn.Sequential:
    """A classifier of 8 x 8 pixels."""
    return nn.Sequential(
        nn.Linear(64, width),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(width, 10),
    )


class Journal:
    """Lines of JSON about steps, saves and restores, for scripts/demo; one print per step."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("a", buffering=1) if path else None
        self._open: list[stillframe.Ticket] = []

    def _write(self, kind: str, **facts: Any) -> None:
        if self._file:
            self._file.write(json.dumps({"kind": kind, **facts}) + "\n")

    def resumed(self, restored: stillframe.Restored | None) -> None:
        """What resume() found."""
        if restored is None:
            print("nothing to resume, a fresh start", flush=True)
            return
        print(f"resumed after step {restored.step} from {restored.source}", flush=True)
        self._write(
            "resume",
            step=restored.step,
            source=restored.source,
            seconds=restored.seconds,
            bytes=restored.bytes,
        )

    def stepped(self, step: int, loss: float) -> None:
        """A step is done."""
        self._write("step", step=step, loss=loss.hex())
        print(f"step {step} loss {loss:.4f}", flush=True)

    def saving(self, ticket: stillframe.Ticket) -> None:
        """A save has begun; earlier ones may be over by now."""
        self._open.append(ticket)
        self._note_ended()

    def finished(self, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        """The training is over: hashes of all that it learnt."""
        self._note_ended()
        weights = hashlib.sha256()
        for tensor in model.state_dict().values():
            weights.update(tensor.numpy().data)
        moments = hashlib.sha256()
        for state in optimizer.state_dict()["state"].values():
            for key in sorted(state):
                moments.update(state[key].numpy().tobytes())
        self._write(
            "end",
            weights=weights.hexdigest(),
            optimizer=moments.hexdigest(),
            scheduler=repr(sorted(scheduler.state_dict().items())),
        )

    def _note_ended(self) -> None:
        for ticket in [ticket for ticket in self._open if ticket.is_final]:
            self._open.remove(ticket)
            self._write(
                "save",
                step=ticket.step,
                state=ticket.state,
                capture=ticket.capture,
                bytes=ticket.bytes,
                times=ticket.times,
            )


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", nargs="?", default="checkpoints/digits", help="the run")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--save-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--batch", type=int, default=32, help="images per step")
    parser.add_argument("--width", type=int, default=128, help="of the hidden layers")
    parser.add_argument(
        "--members", type=int, default=1, help="networks, trained in turn, that vote"
    )
    parser.add_argument("--no-checkpoints", action="store_true")
    parser.add_argument("--journal", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    # A sum depends on how many threads add it up.
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    train(arguments, Journal(arguments.journal))


if __name__ == "__main__":
    main()
