"""A training over a ResumableLoader in its own process.

    loader_process.py DIRECTORY WORKERS PERSISTENT EPOCHS STOP

Resumes, trains to EPOCHS and saves at every batch; stops like a kill after STOP batches of this
process (0: never). Prints each batch, and at the end the digest.
"""

from __future__ import annotations

import os
import sys

import torch
from torch.utils.data import DataLoader

import loading
import stillframe.torch as stillframe


def main() -> None:
    directory = sys.argv[1]
    workers, persistent, epochs, stop = (int(value) for value in sys.argv[2:])
    torch.set_num_threads(1)
    data = DataLoader(
        loading.Augmented(),
        batch_size=loading.BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=bool(persistent),
    )
    # A resumed process must take nothing from its own seed.
    run = loading.Run(data, seed=0 if not os.path.exists(directory) else 77)
    checkpointer = stillframe.Checkpointer(
        directory, model=run.model, optimizer=run.optimizer, keep_last=2
    )
    restored = checkpointer.resume()
    if restored is not None:
        run.loader.load_state_dict(restored.extra["loader"])
        run.step = restored.step
    done = 0
    for epoch in range(run.loader.epoch, epochs):
        for batch in run.loader:
            run.train_on(epoch, batch)
            ticket = checkpointer.save(run.step, extra={"loader": run.loader.state_dict()})
            print("batch", *run.batches[-1], flush=True)
            done += 1
            if done == stop:
                ticket.wait()
                os._exit(0)
    checkpointer.close()
    print("digest", run.digest(), flush=True)


if __name__ == "__main__":
    main()
