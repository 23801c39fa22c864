"""Shows that a training killed at random instants ends like one that never was, bit for bit.

Trains examples/digits.py once undisturbed and once with checkpoints, killing the trainer three
times and the daemon once, all by SIGKILL; a small model, then one with more than 256 MiB of state.
Compares weights, optimizer and every loss; prints what training paid for it. The exit status is 1
if anything differs.

    scripts/demo [--seed N]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demo_support import COMMAND, MIB, ROOT, daemon_pid, milliseconds, print_table, private_daemon

TRAINER = ROOT / "examples" / "digits.py"
FOLDER = ROOT / "build" / "demo"


@dataclasses.dataclass(frozen=True)
class Case:
    """One model and how long it trains."""

    name: str
    members: int
    width: int
    steps: int
    save_every: int
    bytes_min: int = 0


CASES = (
    Case("small", members=1, width=128, steps=240, save_every=4),
    # A step trains one member of eight, but a save takes all: the next step() has to wait for it.
    Case("large", members=8, width=1660, steps=112, save_every=8, bytes_min=256 * MIB),
)


HEAD = ["model", "saves durable", "MiB", "training waited", "to durable",
        "restore: memory", "restore: disk"]  # fmt: skip


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    seed = parser.parse_args().seed
    print(f"random instants from --seed {seed}", flush=True)
    instants = random.Random(seed)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    problems: list[str] = []
    rows = []
    with private_daemon():
        for case in CASES:
            print(f"\n{case.name} model: {case.steps} steps, a save every {case.save_every}")
            straight = train_undisturbed(case)
            killed = train_with_kills(case, instants, straight.seconds_per_step)
            problems += compare(case, straight, killed)
            rows.append(row(case, killed))
        show_runs()
    print("\nmilliseconds: median / largest; saves that a kill cut short are not counted")
    print_table([HEAD, *rows])
    shutil.rmtree(FOLDER)
    for problem in problems:
        print(f"DIFFERS: {problem}")
    if problems:
        sys.exit(1)
    print("\nweights, optimizer state and every loss are equal, bit for bit")


class Journal:
    """What the trainers of one training wrote down; see examples/digits.py."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds_per_step = 0.0

    def entries(self, kind: str) -> list[dict[str, Any]]:
        """All entries of a kind, in order."""
        # A killed trainer may leave half a line.
        found = []
        for line in self.path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry["kind"] == kind:
                found.append(entry)
        return found

    def losses(self) -> list[tuple[int, str]]:
        """Each step with its loss; a step that was done again must have given the same."""
        return sorted({(entry["step"], entry["loss"]) for entry in self.entries("step")})


def start_trainer(case: Case, journal: Journal, *more: str) -> subprocess.Popen[str]:
    """Start examples/digits.py; its lines come through a pipe."""
    command = [sys.executable, str(TRAINER), str(FOLDER / case.name)]
    options = {
        "steps": case.steps,
        "members": case.members,
        "width": case.width,
        "save-every": case.save_every,
    }
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    command += ["--journal", str(journal.path), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def follow(trainer: subprocess.Popen[str]) -> Iterator[int]:
    """The steps that the trainer has done, one by one."""
    assert trainer.stdout is not None
    for line in trainer.stdout:
        words = line.split()
        if words[0] == "step":
            yield int(words[1])
        else:
            print(f"  trainer: {line.strip()}", flush=True)


def finish(trainer: subprocess.Popen[str]) -> None:
    """Let the trainer run to its end."""
    for _ in follow(trainer):
        pass
    if trainer.wait() != 0:
        sys.exit(f"the trainer ended with status {trainer.returncode}")


def train_undisturbed(case: Case) -> Journal:
    """The training that all is compared with: no checkpoints at all."""
    journal = Journal(FOLDER / f"{case.name}-undisturbed.jsonl")
    trainer = start_trainer(case, journal, "--no-checkpoints")
    times = [time.monotonic() for _ in follow(trainer)]
    finish(trainer)
    journal.seconds_per_step = (times[-1] - times[0]) / (len(times) - 1)
    return journal


def train_with_kills(case: Case, instants: random.Random, seconds_per_step: float) -> Journal:
    """The same training; three trainers and one daemon do not live to see its end."""
    journal = Journal(FOLDER / f"{case.name}-killed.jsonl")
    # One kill in each fifth but the first, in which nothing may be durable yet, in any order.
    fifth = case.steps // 5
    victims = ["trainer", "trainer", "trainer", "daemon"]
    instants.shuffle(victims)
    trainer = start_trainer(case, journal)
    steps = follow(trainer)
    for index, victim in enumerate(victims, start=1):
        threshold = index * fifth + instants.randrange(fifth - 1)
        for step in steps:
            if step >= threshold:
                break
        else:
            sys.exit(f"the trainer ended before step {threshold}")
        time.sleep(instants.uniform(0, seconds_per_step))
        if victim == "daemon":
            pid = daemon_pid()
            if pid is None:
                sys.exit("there is no daemon to kill")
            os.kill(pid, signal.SIGKILL)
            print(f"  killed the daemon after step {step}; training goes on", flush=True)
            continue
        trainer.kill()
        trainer.wait()
        print(f"  killed the trainer after step {step}", flush=True)
        trainer = start_trainer(case, journal)
        steps = follow(trainer)
    for _ in steps:
        pass
    finish(trainer)
    # Once more: nothing is left to train, and the daemon let the memory go, so this reads the disk.
    finish(start_trainer(case, journal))
    return journal


def compare(case: Case, straight: Journal, killed: Journal) -> list[str]:
    """What differs, in words."""
    problems = []
    if killed.losses() != straight.losses():
        problems.append(f"{case.name}: the loss curve")
    (expected,) = straight.entries("end")
    for end in killed.entries("end"):
        problems += [f"{case.name}: {key}" for key in expected if end[key] != expected[key]]
    sources = {entry["source"] for entry in killed.entries("resume")}
    problems += [
        f"{case.name}: no restore from {s}" for s in ("memory", "disk") if s not in sources
    ]
    saves = killed.entries("save")
    if case.bytes_min:
        if not any(save["bytes"] >= case.bytes_min for save in saves):
            problems.append(f"{case.name}: less than {case.bytes_min} bytes of state")
        if not any(
            (save["times"].get("to_captured") or 0) > save["times"]["call"] for save in saves
        ):
            problems.append(f"{case.name}: no save was captured after save() had returned")
        if not any(save["times"].get("fence_wait", 0) > 0 for save in saves):
            problems.append(f"{case.name}: no optimizer step waited at the fence")
    return problems


def row(case: Case, journal: Journal) -> list[str]:
    """The case's line of the table."""
    saves = journal.entries("save")
    durable = [save for save in saves if save["state"] == "durable"]
    waited = [save["times"]["call"] + save["times"].get("fence_wait", 0) for save in durable]
    to_durable = [save["times"]["to_durable"] for save in durable]
    restores: dict[str, list[float]] = {"memory": [], "disk": []}
    for entry in journal.entries("resume"):
        restores[entry["source"]].append(entry["seconds"])
    return [
        case.name,
        f"{len(durable)} of {len(saves)}",
        f"{max(save['bytes'] for save in saves) / MIB:.1f}",
        milliseconds(waited),
        milliseconds(to_durable),
        milliseconds(restores["memory"]),
        milliseconds(restores["disk"]),
    ]


def show_runs() -> None:
    """What the command line says about the runs."""
    for case in CASES:
        print(f"\n$ stillframe ls {FOLDER.relative_to(ROOT) / case.name}", flush=True)
        subprocess.run([COMMAND, "ls", FOLDER / case.name], check=False)
        print(f"$ stillframe verify {FOLDER.relative_to(ROOT) / case.name}", flush=True)
        subprocess.run([COMMAND, "verify", FOLDER / case.name], check=True)


if __name__ == "__main__":
    main()
