"""Saves with metrics by step() in its own process: best_trainer.py DIRECTORY FIRST LOSS..."""

from __future__ import annotations

import sys

import torch
from torch import nn

import stillframe.torch as stillframe


def main() -> None:
    directory, first, losses = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    model = nn.Linear(1, 1)
    with stillframe.Checkpointer(
        directory, model=model, best=("val_loss", "min", 2), keep_last=1
    ) as checkpointer:
        checkpointer.resume()
        for step, loss in enumerate(map(float, losses), start=first):
            with torch.no_grad():
                model.weight.fill_(step)
            ticket = checkpointer.step(step, metrics={"val_loss": loss})
            if ticket is not None:
                ticket.wait(timeout=30)
            print(step, ticket is not None, flush=True)


if __name__ == "__main__":
    main()
