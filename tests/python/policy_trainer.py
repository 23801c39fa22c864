"""A training by step() in its own process, which a test signals or breaks.

    policy_trainer.py DIRECTORY MODE

MODE "signals" trains for ever and prints "step N" after each step() but the ones that save; "chain"
has a SIGTERM handler of its own before; "unanswered" calls step() once, then waits for the signal
and closes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import training


def chained(number: int, frame: FrameType | None) -> None:
    os.write(1, f"chained {number}\n".encode())  # print() may be what the signal has come into.


def main() -> None:
    directory, mode = Path(sys.argv[1]), sys.argv[2]
    if mode == "chain":
        signal.signal(signal.SIGTERM, chained)
    run = training.make()
    with run.checkpointer(directory, every_steps=1_000_000) as checkpointer:
        restored = checkpointer.resume()
        step = restored.step + 1 if restored else 0
        while True:
            run.step()
            checkpointer.step(step)
            print("step", step, flush=True)
            if mode == "unanswered" and step == 3:
                break
            step += 1
            time.sleep(0.01)
        print("waiting", flush=True)
        time.sleep(0.5)
        checkpointer.save(step)
    print("not reached by a signal that close() delivers again", flush=True)


if __name__ == "__main__":
    main()
