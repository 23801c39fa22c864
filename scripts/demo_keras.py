"""Shows that a Keras fit() killed at random instants ends like one that never was, bit for bit.

Trains examples/digits_keras.py once undisturbed and once with checkpoints, killing the trainer
twice and the daemon once, all by SIGKILL. Compares weights, optimizer and the last metrics; loads
the best model, evaluates it, and has Keras itself load it from an exported file. The exit status is
1 if anything differs.

    scripts/demo keras [--seed N] [--epochs N]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from demo_support import COMMAND, MIB, ROOT, daemon_pid, print_table, private_daemon

TRAINER = ROOT / "examples" / "digits_keras.py"
FOLDER = ROOT / "build" / "demo-keras"
BATCHES = 45  # Of an epoch.

EVALUATE = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import keras
from sklearn.datasets import load_digits
import stillframe.keras
digits = load_digits()
images = (digits.images[1437:, ..., None] / 16).astype("float32")
for model in (stillframe.keras.load_model(sys.argv[1]), keras.saving.load_model(sys.argv[2])):
    values = model.evaluate(images, digits.target[1437:], verbose=0)
    print(*[float(value).hex() for value in values])
"""


def main() -> None:
    """Run both trainings, compare, and look at what was kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--epochs", type=int, default=6)
    arguments = parser.parse_args()
    print(f"random instants from --seed {arguments.seed}", flush=True)
    instants = random.Random(arguments.seed)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    with private_daemon():
        print("\nundisturbed, without checkpoints", flush=True)
        expected = end_of(start_trainer(arguments.epochs, "--no-checkpoints"))
        print("with checkpoints, and killed", flush=True)
        killed = train_with_kills(arguments.epochs, instants)
        problems = [key for key in expected if killed[key] != expected[key]]
        rows = [row("backup"), row("best")]
        problems += look_at_best()
    print()
    print_table([["run", "checkpoints", "steps", "MiB each"], *rows])
    shutil.rmtree(FOLDER)
    for problem in problems:
        print(f"DIFFERS: {problem}")
    if problems:
        sys.exit(1)
    print("\nweights, optimizer state and the last metrics are equal, bit for bit")


def start_trainer(epochs: int, *more: str) -> subprocess.Popen[str]:
    """Start examples/digits_keras.py; its lines come through a pipe."""
    command = [sys.executable, str(TRAINER), str(FOLDER), "--epochs", str(epochs), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def follow(trainer: subprocess.Popen[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """How many batches the training has come to, and at its end what it ended with."""
    assert trainer.stdout is not None
    for line in trainer.stdout:
        kind, _, rest = line.partition(" ")
        if kind == "batch":
            epoch, batch = map(int, rest.split())
            yield epoch * BATCHES + batch, {}
        elif kind == "end":
            yield -1, json.loads(rest)


def end_of(trainer: subprocess.Popen[str]) -> dict[str, Any]:
    """Let the trainer run to its end."""
    found: dict[str, Any] = {}
    for _, end in follow(trainer):
        found = end
    if trainer.wait() != 0 or not found:
        sys.exit(f"the trainer ended with status {trainer.returncode}")
    return found


def train_with_kills(epochs: int, instants: random.Random) -> dict[str, Any]:
    """Two trainers and one daemon do not live to see the end, each in a quarter of its own."""
    quarter = epochs * BATCHES // 4
    victims = ["trainer", "trainer", "daemon"]
    instants.shuffle(victims)
    trainer = start_trainer(epochs)
    batches = follow(trainer)
    for index, victim in enumerate(victims, start=1):
        threshold = index * quarter + instants.randrange(quarter - 1)
        at = next((at for at, _ in batches if at >= threshold), None)
        if at is None:
            sys.exit(f"the trainer ended before batch {threshold}")
        place = f"epoch {at // BATCHES + 1}, batch {at % BATCHES + 1}"
        if victim == "daemon":
            pid = daemon_pid()
            if pid is None:
                sys.exit("there is no daemon to kill")
            os.kill(pid, signal.SIGKILL)
            print(f"  killed the daemon in {place}; training goes on", flush=True)
            continue
        trainer.kill()
        trainer.wait()
        print(f"  killed the trainer in {place}", flush=True)
        trainer = start_trainer(epochs)
        batches = follow(trainer)
        first = next(batches)[0]
        print(f"  resumed at epoch {first // BATCHES + 1}, batch {first % BATCHES + 1}", flush=True)
    found = [end for _, end in batches if end]
    if trainer.wait() != 0 or not found:
        sys.exit(f"the trainer ended with status {trainer.returncode}")
    return found[0]


def look_at_best() -> list[str]:
    """Load the best model in a process of its own, ours and an exported one."""
    run = FOLDER / "best"
    subprocess.run([COMMAND, "ls", run], check=True)
    exported = FOLDER / "best.keras"
    environment = {**os.environ, "STILLFRAME_PYTHON": sys.executable}
    subprocess.run(
        [COMMAND, "export", f"{run}@latest", exported, "--to", "keras"],
        env=environment,
        check=True,
    )
    done = subprocess.run(
        [sys.executable, "-c", EVALUATE, f"{run}@latest", exported],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    ours, theirs = done.stdout.splitlines()[-2:]
    accuracy = float.fromhex(ours.split()[1])
    print(f"the best model's accuracy on digits it never saw: {accuracy:.1%}")
    return [] if ours == theirs else ["the exported best model"]


def row(name: str) -> list[str]:
    """The run's line of the table."""
    listed = subprocess.run(
        [COMMAND, "ls", FOLDER / name, "--json"], capture_output=True, check=True
    )
    found = json.loads(listed.stdout)["checkpoints"]
    steps = ", ".join(str(one["step"]) for one in found)
    sizes = max((one["bytes"] for one in found), default=0)
    return [name, str(len(found)), steps, f"{sizes / MIB:.1f}"]


if __name__ == "__main__":
    main()
