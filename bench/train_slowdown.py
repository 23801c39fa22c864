"""Lost step time per checkpoint: how much longer a training takes with checkpoints than without.

    python bench/train_slowdown.py --directory DIR [--quick] [--device cuda]

Trainings of the same 512 MiB of parameters and Adam moments: `cpu` computes forward and backward;
`paced` waits a fixed time as for a device, then updates every tensor in place; with --device cuda
`gpu` alone, which computes there. Each arm is a process of its own and runs all of them: `none`
takes no checkpoint, the others take some, every `interval` steps. Lost time is (sum of the steps -
sum of the steps of `none`) / checkpoints, split into the call that saves, the wait at the fence,
and the smear, which is the rest: what copying and writing take from the steps after. On a GPU the
steps are timed without waiting for it, but around the whole.

The window begins one step before the first counted save and ends at a step fixed in advance, by
which the last counted checkpoint must be durable; if not, the result says so. Checked in the same
run: all arms end with the same weights bit for bit, and the last checkpoint of each equals the
state of an untimed replay at that step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import stillframe.torch as stillframe
from rounds import Ratio, machine, process_cpu_seconds, ratio

PARAMETER_LAYERS = 4
WIDTH = 3344  # 4 x 3344^2 x 4 bytes x 3 (weights and two moments) = 512 MiB.
BATCH = 16
PACED_SECONDS = 0.1
WARMUP_STEPS = 2
GPU_BATCH = 8192  # Some tens of milliseconds a step.
ARMS = ("none", "stillframe", "torch.save", "clone+thread", "dcp.async_save")
GPU_ARMS = (
    *("none", "stillframe", "stillframe hbm", "stillframe ipc"),
    *("torch.save", "pinned+thread", "dcp.async_save"),
)
# Interval in steps, long enough for each contender to be done before its next save.
INTERVALS = {"paced": 8, "cpu": 6}
GPU_INTERVALS = {"gpu": 24}


def arms_of(device: str) -> tuple[str, ...]:
    """The contenders on a device, `none` first."""
    return GPU_ARMS if device == "cuda" else ARMS


def intervals_of(device: str) -> dict[str, int]:
    """The trainings on a device, and the steps between their saves."""
    return GPU_INTERVALS if device == "cuda" else INTERVALS


def settle(device: str) -> None:
    """Wait until a GPU has done all that it was given: around a window, never within."""
    if device == "cuda":
        torch.cuda.synchronize()


class Training:
    """The model, its Adam, and one step of either kind."""

    def __init__(self, device: str, width: int) -> None:
        torch.manual_seed(1)
        self.device = device
        layers = [torch.nn.Linear(width, width, bias=False) for _ in range(PARAMETER_LAYERS)]
        self.model = torch.nn.Sequential(*layers).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, fused=True)
        self.data = torch.randn(GPU_BATCH if device == "cuda" else BATCH, width, device=device)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
        self.optimizer.step()

    def step(self, kind: str) -> None:
        """One step; `paced` uses the gradients that are there."""
        if kind == "paced":
            time.sleep(PACED_SECONDS)
        else:
            self.optimizer.zero_grad(set_to_none=False)
            self.model(self.data).square().mean().backward()
        self.optimizer.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights and moments by the names that Stillframe gives them."""
        named = {name: value.detach() for name, value in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                named[f"optimizer.state.{name}.{key}"] = value
        return named


def checksum(tensors: dict[str, torch.Tensor]) -> int:
    """One number for all bytes of all tensors, whatever their order in the dict."""
    value = 0
    for name in sorted(tensors):
        contiguous = tensors[name].cpu().contiguous().reshape(-1).view(torch.uint8)
        value = zlib.crc32(memoryview(contiguous.numpy()), zlib.crc32(name.encode(), value))
    return value


class Saver(Protocol):
    """A contender. finish() returns once its newest checkpoint is durable."""

    def save(self, step: int) -> None:
        """Save the state of now; returns when training may go on."""

    def is_durable(self) -> bool:
        """Whether the newest checkpoint is on the disk."""

    def fence_seconds(self) -> float:
        """Seconds that the optimizer's steps have waited for saves, in all."""

    def finish(self) -> None:
        """Wait for what is still being written."""

    def load(self) -> dict[str, torch.Tensor]:
        """The tensors of the newest checkpoint."""


class Stillframe:
    """Checkpointer.save(), lazy."""

    def __init__(self, directory: Path, training: Training, lane: Any = "auto") -> None:
        self.run = directory / "run"
        self.checkpointer = stillframe.Checkpointer(
            self.run, model=training.model, optimizer=training.optimizer, keep_last=1, lane=lane
        )
        self.tickets: list[Any] = []

    def save(self, step: int) -> None:
        self.tickets.append(self.checkpointer.save(step))

    def is_durable(self) -> bool:
        return bool(self.tickets[-1].state == "durable")

    def fence_seconds(self) -> float:
        return sum(ticket.times["fence_wait"] or 0.0 for ticket in self.tickets)

    def finish(self) -> None:
        self.tickets[-1].wait("durable", timeout=60)

    def load(self) -> dict[str, torch.Tensor]:
        newest = max(self.run.glob("0*"))
        return load_file(newest / "model.safetensors") | load_file(newest / "optimizer.safetensors")


class TorchSave:
    """torch.save + fsync of file and directory, before training goes on."""

    def __init__(self, directory: Path, training: Training) -> None:
        self.directory = directory
        self.training = training
        self.newest: Path | None = None

    def save(self, step: int) -> None:
        self._write(step, self.training.tensors())

    def _write(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        path = self.directory / f"step-{step}.pt"
        torch.save(tensors, path)
        _sync(path)
        _sync(self.directory)
        before, self.newest = self.newest, path
        if before is not None:
            before.unlink()

    def is_durable(self) -> bool:
        return True

    def fence_seconds(self) -> float:
        return 0.0

    def finish(self) -> None:
        pass

    def load(self) -> dict[str, torch.Tensor]:
        assert self.newest is not None
        loaded: dict[str, torch.Tensor] = torch.load(self.newest)
        return loaded


class CloneThread(TorchSave):
    """clone() of everything, then torch.save + fsync by a thread; one at a time."""

    thread: threading.Thread | None = None

    def save(self, step: int) -> None:
        self.finish()
        cloned = {name: value.clone() for name, value in self.training.tensors().items()}
        self.thread = threading.Thread(target=self._write, args=(step, cloned))
        self.thread.start()

    def is_durable(self) -> bool:
        return self.thread is None or not self.thread.is_alive()

    def finish(self) -> None:
        if self.thread is not None:
            self.thread.join()


class PinnedThread(CloneThread):
    """Copies to page-locked memory in a stream of its own, then torch.save + fsync by a thread."""

    def __init__(self, directory: Path, training: Training) -> None:
        super().__init__(directory, training)
        self.stream = torch.cuda.Stream()
        self.staged = {
            name: torch.empty_like(value, device="cpu", pin_memory=True)
            for name, value in training.tensors().items()
        }

    def save(self, step: int) -> None:
        self.finish()
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for name, value in self.training.tensors().items():
                self.staged[name].copy_(value, non_blocking=True)
        copied = self.stream.record_event()
        # The next step writes what is copied here.
        current.wait_stream(self.stream)

        def write() -> None:
            copied.synchronize()
            self._write(step, self.staged)

        self.thread = threading.Thread(target=write)
        self.thread.start()


class DcpAsync:
    """dcp.async_save with its default stager and thread; it fsyncs files, not directories."""

    def __init__(self, directory: Path, training: Training) -> None:
        self.directory = directory
        self.training = training
        self.future: Any = None
        self.newest: Path | None = None

    def save(self, step: int) -> None:
        self.finish()
        before, self.newest = self.newest, self.directory / f"dcp-{step}"
        if before is not None:
            shutil.rmtree(before)
        self.future = dcp.async_save(
            self.training.tensors(), checkpoint_id=self.newest, no_dist=True
        )

    def is_durable(self) -> bool:
        return bool(self.future.done())

    def fence_seconds(self) -> float:
        return 0.0

    def finish(self) -> None:
        if self.future is not None:
            self.future.result()

    def load(self) -> dict[str, torch.Tensor]:
        loaded = {name: torch.empty_like(value) for name, value in self.training.tensors().items()}
        dcp.load(loaded, checkpoint_id=self.newest, no_dist=True)
        return loaded


SAVERS: dict[str, Callable[[Path, Training], Saver]] = {
    "stillframe": Stillframe,
    "stillframe hbm": partial(Stillframe, lane="hbm"),
    "stillframe ipc": partial(Stillframe, lane="ipc"),
    "torch.save": TorchSave,
    "clone+thread": CloneThread,
    "pinned+thread": PinnedThread,
    "dcp.async_save": DcpAsync,
}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def run_window(
    kind: str,
    training: Training,
    saver: Saver | None,
    checkpoints: int,
    *,
    first_step: int,
    replays: bool,
) -> dict[str, Any]:
    """The measured steps of one arm; with `replays` also the sum of the state saved last."""
    interval = intervals_of(training.device)[kind]
    # A save is lazy only where the optimizer has stepped since the one before.
    training.step(kind)
    fence_before = saver.fence_seconds() if saver is not None else 0.0
    settle(training.device)
    boundaries = [time.perf_counter()]
    call_seconds = 0.0
    saved_sum = None
    for step in range(1 + interval * checkpoints):
        if step >= 1 and (step - 1) % interval == 0:
            begin = time.perf_counter()
            if saver is not None:
                saver.save(first_step + step)
            elif replays and step == 1 + interval * (checkpoints - 1):
                saved_sum = checksum(training.tensors())
            call_seconds += time.perf_counter() - begin
        training.step(kind)
        if step == interval * checkpoints:
            settle(training.device)
        boundaries.append(time.perf_counter())
    result: dict[str, Any] = {
        "steps_ms": [
            round(1e3 * (after - before), 2) for before, after in itertools.pairwise(boundaries)
        ],
        # Of a replay, without the sums.
        "seconds": boundaries[-1] - boundaries[0] - (call_seconds if replays else 0.0),
        "saved_sum": saved_sum,
    }
    if saver is not None:
        result["is_durable_at_end"] = saver.is_durable()
        saver.finish()
        result["call_seconds"] = call_seconds
        result["fence_seconds"] = saver.fence_seconds() - fence_before
        result["saved_sum"] = checksum(saver.load())
    result["final_sum"] = checksum(training.tensors())
    return result


def run_arm(
    arm: str, directory: Path, checkpoints: int, replays: bool, device: str, width: int
) -> dict[str, Any]:
    """All trainings, one after the other, in this process."""
    torch.set_num_threads(1)
    training = Training(device, width)
    saver = SAVERS[arm](directory, training) if arm != "none" else None
    results: dict[str, Any] = {}
    before = process_cpu_seconds()
    # Arena, files and the spool.
    for step in range(WARMUP_STEPS):
        training.step("cpu")
        if saver is not None:
            saver.save(step)
            saver.finish()
    first_step = WARMUP_STEPS
    for kind, interval in intervals_of(device).items():
        results[kind] = run_window(
            kind, training, saver, checkpoints, first_step=first_step, replays=replays
        )
        first_step += 2 + interval * checkpoints
    results["cpu_seconds"] = process_cpu_seconds() - before
    if isinstance(saver, Stillframe):
        results["capture"] = saver.tickets[-1].capture
        results["lane"] = saver.checkpointer.status["lane"]
        saver.checkpointer.close()
    return results


def start_arm(
    arm: str,
    directory: Path,
    checkpoints: int,
    device: str,
    width: int,
    *,
    replays: bool = False,
) -> Any:
    """The same in a process of its own, with an empty directory."""
    scratch = directory / "arm"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    command = [sys.executable, __file__, "--directory", str(scratch), "--arm", arm]
    command += ["--checkpoints", str(checkpoints), "--device", device, "--width", str(width)]
    command += ["--replay"] if replays else []
    begin = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    print(f"{arm}: {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
    shutil.rmtree(scratch, ignore_errors=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(name: str, **figures: object) -> None:
    """Print one result line."""
    print(json.dumps({"benchmark": name, **figures}), flush=True)


def summarise(
    kind: str,
    arms: Sequence[str],
    rounds: list[dict[str, Any]],
    replay: dict[str, Any],
    checkpoints: int,
    device: str,
) -> None:
    """Print lost time per checkpoint of every contender, and what was checked."""
    bases = [
        (one["none"][kind]["seconds"] + one["none again"][kind]["seconds"]) / 2 for one in rounds
    ]
    interval = intervals_of(device)[kind]
    mean_step = statistics.mean(bases) / (1 + interval * checkpoints)
    for arm in arms[1:]:
        taken = [one[arm][kind] for one in rounds]
        lost = [
            (arm_result["seconds"] - base) / checkpoints
            for arm_result, base in zip(taken, bases, strict=True)
        ]
        call = statistics.median(one["call_seconds"] / checkpoints for one in taken)
        fence = statistics.median(one["fence_seconds"] / checkpoints for one in taken)
        slower: Ratio = ratio([one["seconds"] for one in taken], bases)
        median_lost = statistics.median(lost)
        report(
            f"train_slowdown_{kind}",
            contender=arm,
            lost_ms_per_checkpoint=round(1e3 * median_lost, 1),
            lost_ms_range=[round(1e3 * min(lost), 1), round(1e3 * max(lost), 1)],
            call_ms=round(1e3 * call, 2),
            fence_ms=round(1e3 * fence, 2),
            smear_ms=round(1e3 * (median_lost - call - fence), 1),
            interval_steps=interval,
            step_ms=round(1e3 * mean_step, 1),
            steps_with_over_without=round(slower.median, 4),
            void_not_durable_at_end=sum(not one["is_durable_at_end"] for one in taken),
            checkpoint_equals_replay=all(
                one["saved_sum"] == replay[kind]["saved_sum"] for one in taken
            ),
            weights_equal=all(one["final_sum"] == replay[kind]["final_sum"] for one in taken),
        )


def main() -> None:
    """Rounds of all arms; with --arm, one of them, for the rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, required=True, help="on the disk to measure")
    parser.add_argument(
        "--quick", action="store_true", help="1 round of 2 checkpoints, not 7 of 20"
    )
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--checkpoints", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--width", type=int, default=WIDTH, help="of each of 4 square layers")
    parser.add_argument("--arm", choices=("none", *SAVERS), help=argparse.SUPPRESS)
    parser.add_argument("--replay", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--arms", help="only these contenders, with commas")
    arguments = parser.parse_args()
    device, width = arguments.device, arguments.width
    arms = arms_of(device)
    if arguments.arms:
        arms = ("none", *arguments.arms.split(","))
    count = arguments.rounds or (1 if arguments.quick else 7)
    checkpoints = arguments.checkpoints or (2 if arguments.quick else 20)
    if arguments.arm:
        results = run_arm(
            arguments.arm, arguments.directory, checkpoints, arguments.replay, device, width
        )
        print(json.dumps(results))
        return
    report(
        "train_slowdown",
        **machine(),
        torch=torch.__version__,
        gpu=torch.cuda.get_device_name() if device == "cuda" else None,
        threads="1 of training, not pinned",
        rounds=count,
        checkpoints=checkpoints,
        state_mib=PARAMETER_LAYERS * width**2 * 4 * 3 // 2**20,
        void_rule="the runs without checkpoints of a round differ by more than 10 %",
    )
    directory = arguments.directory / "stillframe-train-slowdown"
    try:
        replay = start_arm("none", directory, checkpoints, device, width, replays=True)
        rounds: list[dict[str, Any]] = []
        void_count = 0
        while len(rounds) < count and len(rounds) + void_count < 3 * count:
            turn = (len(rounds) + void_count) % (len(arms) - 1)
            order = ["none", *arms[1 + turn :], *arms[1 : 1 + turn], "none again"]
            if arguments.quick:
                order.pop()  # The replay is as good.
            one = {
                arm: start_arm(arm.removesuffix(" again"), directory, checkpoints, device, width)
                for arm in order
            }
            one.setdefault("none again", replay)
            pairs = [
                (one["none"][k]["seconds"], one["none again"][k]["seconds"])
                for k in intervals_of(device)
            ]
            is_void = any(max(pair) > 1.1 * min(pair) for pair in pairs)
            report("train_slowdown_round", order=order, void=is_void, arms=one)
            # A quick run has one round and shows it, void or not.
            if is_void and not arguments.quick:
                void_count += 1
            else:
                rounds.append(one)
        for kind in intervals_of(device):
            summarise(kind, arms, rounds, replay, checkpoints, device)
        report("train_slowdown_rounds", valid=len(rounds), void=void_count)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
