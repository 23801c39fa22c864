"""A training in its own process, which a test kills.

    trainer_process.py DIRECTORY STEPS PAUSE

Resumes, trains to STEPS, saves at every step, prints "step N" and at the end the digest.
PAUSE seconds between steps give the killer time.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import training


def main() -> None:
    directory, steps, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    run = training.make()
    with run.checkpointer(directory, check="full") as checkpointer:
        restored = checkpointer.resume()
        first = restored.step + 1 if restored else 0
        print("resumed", first, restored.source if restored else "nothing", flush=True)
        for step in range(first, steps):
            run.step()
            checkpointer.save(step, metrics={"loss": run.losses[-1]}, extra={"epoch": step // 4})
            print("step", step, flush=True)
            time.sleep(pause)
    print("digest", run.digest(), flush=True)


if __name__ == "__main__":
    main()
