"""What a PyTorch user waits for: Stillframe beside torch.save and safetensors, each made durable.

    python bench/torch_bench.py --raw build/release/raw_bench --directory DIR [--quick]

Prints one JSON line per figure. All contenders save the same tensors to the same disk in rotated
rounds, and "durable" means fsynced files and directories for everyone (Stillframe: the ticket's
state).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

import stillframe.torch as stillframe
from rounds import machine, process_cpu_seconds, ratio, raw_seconds, run_rounds

MIB = 2**20


class State(torch.nn.Module):
    """A model that is only its parameters, with Adam-like state beside it."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.tensors = torch.nn.ParameterList(
            torch.nn.Parameter(torch.randn(size)) for size in sizes
        )


def training_state(total_bytes: int, tensor_count: int) -> tuple[State, torch.optim.Adam]:
    """A model and its Adam after one step: parameters, two moments each, and the 0-d steps."""
    parameter_count = tensor_count // 4
    elements = total_bytes // 4 // 3 // parameter_count
    model = State([elements] * parameter_count)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, foreach=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return model, optimizer


def small_tensors(total_bytes: int, count: int, seed: int) -> State:
    """`count` tensors of log-normal sizes, 256 B to 1 MiB, that together have `total_bytes`."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.exp(torch.randn(count, generator=generator) * 1.5)
    sizes = (weights / weights.sum() * (total_bytes / 4)).long().clamp(64, MIB // 4)
    return State(sizes.tolist())


def flat_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None
) -> dict[str, torch.Tensor]:
    """Everything as one dict of tensors: what a peer is given to save."""
    tensors = {name: value.detach() for name, value in model.state_dict().items()}
    if optimizer is not None:
        for index, state in optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{index}.{key}": value for key, value in state.items()})
    return tensors


def sync(path: Path) -> None:
    """fsync a file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Peers:
    """The contenders: each call saves the same tensors and returns the seconds to durable."""

    def __init__(
        self, directory: Path, model: State, optimizer: torch.optim.Optimizer | None
    ) -> None:
        self.directory = directory
        self.tensors = flat_tensors(model, optimizer)
        self.bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        self.step = 0
        directory.mkdir()
        self.checkpointer = stillframe.Checkpointer(
            directory / "run", model=model, optimizer=optimizer, keep_last=2
        )

    def stillframe(self) -> float:
        """Save through the daemon and wait for DURABLE."""
        self.step += 1
        begin = time.perf_counter()
        ticket = self.checkpointer.save(self.step)
        ticket.wait("durable", timeout=120)
        return time.perf_counter() - begin

    def file(self, write: Callable[[Path], None]) -> float:
        """Write a new file, fsync it and its directory; the old one goes outside the timing."""
        self.step += 1
        path = self.directory / f"peer-{self.step}"
        begin = time.perf_counter()
        write(path)
        sync(path)
        sync(self.directory)
        seconds = time.perf_counter() - begin
        path.unlink()
        return seconds

    def safetensors(self) -> float:
        """safetensors save_file + fsync."""
        return self.file(lambda path: save_file(self.tensors, path))

    def torch_save(self) -> float:
        """torch.save + fsync."""
        return self.file(lambda path: torch.save(self.tensors, path))


def report(name: str, **figures: object) -> None:
    """Print one result line."""
    print(json.dumps({"benchmark": name, **figures}), flush=True)


def compare(name: str, peers: Peers, raw: Callable[[], float], rounds: int) -> None:
    """Time to durable of every contender; ratios to Stillframe and to the raw write."""
    contenders = {
        "stillframe": peers.stillframe,
        "safetensors+fsync": peers.safetensors,
        "torch.save+fsync": peers.torch_save,
    }
    for _ in range(4):  # Arena, files and, past keep_last, the spool.
        peers.stillframe()
    taken, void_count = run_rounds(raw, contenders, rounds)
    ours = [one.seconds["stillframe"] for one in taken]
    ceiling = [one.calibrator for one in taken]
    of_raw = ratio(ours, ceiling)
    report(
        name,
        contender="stillframe",
        bytes=peers.bytes,
        x_raw_write=of_raw.median,
        x_raw_range=[of_raw.low, of_raw.high],
        seconds=sorted(ours),
        void_rounds=void_count,
    )
    for contender in list(contenders)[1:]:
        theirs = [one.seconds[contender] for one in taken]
        faster = ratio(theirs, ours)
        report(
            name,
            contender=contender,
            x_stillframe=faster.median,
            range=[faster.low, faster.high],
            interval=list(faster.interval),
            seconds=sorted(theirs),
        )


def cpu_cost(name: str, peers: Peers, count: int) -> None:
    """CPU seconds of trainer and daemon per GiB saved."""
    status = json.loads(
        subprocess.run(
            ["stillframe", "status", "--json"], check=True, capture_output=True, text=True
        ).stdout
    )
    daemon = int(status["pid"])
    before = process_cpu_seconds() + process_cpu_seconds(daemon)
    for _ in range(count):
        peers.stillframe()
    spent = process_cpu_seconds() + process_cpu_seconds(daemon) - before
    report(name, cpu_seconds_per_gib=spent / (count * peers.bytes / 2**30), target=0.40)


def lazy_call(
    name: str,
    directory: Path,
    model: State,
    optimizer: torch.optim.Optimizer,
    rounds: int,
    target_ms: float,
) -> None:
    """Duration of save() in lazy mode with an unchanged layout."""
    seconds = []
    with stillframe.Checkpointer(
        directory / name, model=model, optimizer=optimizer, keep_last=2, capture="lazy"
    ) as checkpointer:
        for step in range(rounds + 3):
            begin = time.perf_counter()
            ticket = checkpointer.save(step)
            elapsed = time.perf_counter() - begin
            optimizer.step()
            ticket.wait("durable", timeout=60)
            if step >= 3:
                seconds.append(elapsed)
    seconds.sort()
    report(
        name,
        milliseconds_median=1e3 * seconds[len(seconds) // 2],
        milliseconds_min=1e3 * seconds[0],
        milliseconds_max=1e3 * seconds[-1],
        target=target_ms,
    )


def step_call(directory: Path, count: int) -> None:
    """Duration of a step() that does not save, once all saves have ended and while one has not."""
    model, optimizer = training_state(64 * MIB, 300)
    with stillframe.Checkpointer(
        directory / "step",
        model=model,
        optimizer=optimizer,
        every_steps=10 * count,
        every_seconds=3600,
        best=("loss", "min", 3),
    ) as checkpointer:
        for name in ("ended", "under_way"):
            if name == "under_way":
                checkpointer.save(count, metrics={"loss": 0.0})
            seconds = []
            for step in range(1, count):
                begin = time.perf_counter()
                checkpointer.step(step)
                seconds.append(time.perf_counter() - begin)
            seconds.sort()
            report(
                f"step_call_without_save_{name}",
                microseconds_median=1e6 * seconds[len(seconds) // 2],
                microseconds_p99=1e6 * seconds[len(seconds) * 99 // 100],
                microseconds_max=1e6 * seconds[-1],
                target=5.0,
            )


FIRST_SAVE = """
import sys, time
sys.path.insert(0, sys.argv[2])
from torch_bench import training_state, MIB
import stillframe.torch as stillframe
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
model, optimizer = training_state(512 * MIB, 400)
before = anonymous()
begin = time.perf_counter()
checkpointer = stillframe.Checkpointer(sys.argv[1], model=model, optimizer=optimizer)
ticket = checkpointer.save(0)
called = time.perf_counter()
ticket.wait("durable", timeout=120)
durable = time.perf_counter()
for step in range(1, 4):
    checkpointer.save(step).wait("durable", timeout=120)
print(called - begin, durable - begin, anonymous() - before)
checkpointer.close()
"""


def first_save(directory: Path) -> None:
    """First save of 512 MiB in a fresh process, attach included, and the trainer's growth."""
    output = subprocess.run(
        [sys.executable, "-c", FIRST_SAVE, directory / "first", Path(__file__).parent],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    call, durable, growth = (float(word) for word in output.split())
    report(
        "first_save_512_mib",
        call_seconds=call,
        durable_seconds=durable,
        trainer_growth_mib=growth,
        growth_target_mib=32,
    )


def main() -> None:
    """Run all figures in a scratch directory under --directory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", type=Path, required=True, help="the raw_bench calibrator")
    parser.add_argument(
        "--directory", type=Path, required=True, help="a directory on the disk to measure"
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 7")
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else 7
    torch.set_num_threads(2)
    report("machine", **machine(), torch=torch.__version__)

    directory = arguments.directory / "stillframe-torch-bench"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    scratch = directory / "raw"

    def raw(total_bytes: int) -> Callable[[], float]:
        return lambda: raw_seconds(
            arguments.raw, "write", "--path", str(scratch), "--mib", str(total_bytes // MIB)
        )

    try:
        few = training_state(64 * MIB, 300)
        lazy_call("save_call_lazy_300_tensors", directory, *few, rounds=20, target_ms=1.0)
        many = small_tensors(64 * MIB, 20_000, seed=1)
        steps = torch.optim.SGD(many.parameters(), lr=0.1)
        lazy_call("save_call_lazy_20000_tensors", directory, many, steps, rounds=8, target_ms=12.0)
        step_call(directory, 20_000)
        first_save(directory)
        peers = Peers(directory / "a", *training_state(512 * MIB, 400))
        compare("durable_512_mib_400_tensors", peers, raw(512 * MIB), rounds)
        cpu_cost("cpu_512_mib", peers, 4)
        peers.checkpointer.close()
        peers = Peers(directory / "e", small_tensors(256 * MIB, 20_000, seed=1), None)
        compare("durable_256_mib_20000_tensors", peers, raw(256 * MIB), rounds)
        peers.checkpointer.close()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
