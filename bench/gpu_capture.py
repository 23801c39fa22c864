"""What a capture of each lane costs a GPU that computes meanwhile, and how fast it is.

    gpu_capture.py --directory DIR [--device cuda|cpu] [--mib N] [--rounds N]

For each lane, beside a ceiling of the same run: the time of a loop of matrix products while a
capture is under way over the time without one, and the same beside plain copies to page-locked
memory, which no lane can be kinder than; the seconds of one such copy of all the bytes over those
from save() to "captured", with the worker's pauses off; and the memory of the GPU that the first
save took, a worker's context with it. Then restores to the GPU of few and of many tensors, from
memory and from the disk (its cache emptied of the files), beside one copy from page-locked memory
and one plain read of the files. Prints JSON Lines. On the CPU it shows only that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from pathlib import Path

import torch

import stillframe.torch as stillframe
from rounds import machine

LANES = ("pinned", "hbm", "ipc")
TENSORS = 300
MANY_TENSORS = 20_000
PRODUCTS = 4


class Loop:
    """Matrix products that leave the state alone."""

    def __init__(self, device: str) -> None:
        size = 8192 if device == "cuda" else 256
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.device = device
        self.left, self.right, self.out = (
            torch.randn(size, size, device=device, dtype=dtype) for _ in range(3)
        )

    def seconds(self) -> float:
        """Of some products, until their stream is done, whatever other streams do."""
        settle_stream(self.device)
        begin = time.perf_counter()
        for _ in range(PRODUCTS):
            torch.mm(self.left, self.right, out=self.out)
        settle_stream(self.device)
        return time.perf_counter() - begin


def settle(device: str) -> None:
    """Wait until a GPU has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def settle_stream(device: str) -> None:
    """Wait until the current stream has."""
    if device == "cuda":
        torch.cuda.current_stream().synchronize()


def free_mib(device: str) -> int:
    """What is left of the GPU's memory, whoever has it."""
    return torch.cuda.mem_get_info()[0] >> 20 if device == "cuda" else 0


class RawCopy:
    """Copies of each tensor to page-locked memory and back."""

    def __init__(self, state: torch.nn.Module, device: str) -> None:
        self.device = device
        self.tensors = [one.detach() for one in state.parameters()]
        pin = device == "cuda"
        self.staged = [torch.empty_like(one, device="cpu", pin_memory=pin) for one in self.tensors]
        self.start()  # Finds the pages of `staged`.
        settle(device)

    def start(self, *, comes_back: bool = False) -> None:
        """Begin one, in the current stream."""
        for held, one in zip(self.staged, self.tensors, strict=True):
            if comes_back:
                one.copy_(held, non_blocking=True)
            else:
                held.copy_(one, non_blocking=True)

    def seconds(self, *, comes_back: bool = False) -> float:
        """The best of three."""
        taken = []
        for _ in range(3):
            settle(self.device)
            begin = time.perf_counter()
            self.start(comes_back=comes_back)
            settle(self.device)
            taken.append(time.perf_counter() - begin)
        return min(taken)

    def loop_slowed(self, loop: Loop) -> float:
        """A loop beside a copy over one alone."""
        if self.device != "cuda":
            return 1.0
        stream = torch.cuda.Stream()
        alone, beside = [], []
        for _ in range(5):
            alone.append(loop.seconds())
            # Enough of them that the loop ends first.
            with torch.cuda.stream(stream):
                self.start()
                self.start()
            beside.append(loop.seconds())
            settle(self.device)
        return statistics.median(beside) / statistics.median(alone)


def make_state(mib: int, device: str, tensors: int = TENSORS) -> torch.nn.Module:
    """So many tensors of one size."""
    width = int((mib * 2**20 / 4 / tensors) ** 0.5)
    return torch.nn.ParameterList(torch.ones(width, width, device=device) for _ in range(tensors))


def read_seconds(checkpoint: Path) -> float:
    """A plain read of the files, from the disk."""
    buffer = bytearray(16 << 20)
    drop_from_cache(checkpoint)
    begin = time.perf_counter()
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begin


def drop_from_cache(checkpoint: Path) -> None:
    """So that the next read of its files goes to the disk, where the file system lets it."""
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(lane: str, directory: Path, mib: int, rounds: int, device: str) -> dict[str, object]:
    """One lane: its ratios, each the median of the rounds."""
    state = make_state(mib, device)
    optimizer = torch.optim.SGD(state.parameters(), lr=0.1)
    raw_copy = RawCopy(state, device)
    raw_seconds = raw_copy.seconds()
    loop = Loop(device)
    loop.seconds()
    raw_slowed = raw_copy.loop_slowed(loop)
    del raw_copy
    before = free_mib(device)
    slower, rate, beside, call = [], [], [], []
    with stillframe.Checkpointer(
        directory / lane, model=state, optimizer=optimizer, keep_last=1, capture="lazy", lane=lane
    ) as checkpointer:
        for step in range(2):  # Both slots, a worker's context, the files.
            checkpointer.save(step).wait("durable", timeout=300)
        taken_mib = before - free_mib(device)
        for step in range(2, 2 + rounds):
            alone = statistics.median(loop.seconds() for _ in range(5))
            ticket = checkpointer.save(step)
            ticket.wait("captured", timeout=60)
            rate.append(raw_seconds / (ticket.times["to_captured"] or 1e9))
            call.append(ticket.times["call"] or 0.0)
            ticket.wait("durable", timeout=300)
            ticket = checkpointer.save(step)
            during = []
            while ticket.state == "accepted":
                during.append(loop.seconds())
            slower.append(statistics.median(during or [alone]) / alone)
            beside.append(len(during))
            ticket.wait("durable", timeout=300)
        in_use = checkpointer.status["lane"]
    return {
        "lane": lane,
        "lane_in_use": in_use,
        "loop_slowed": round(statistics.median(slower), 3),
        "loop_slowed_by_raw_copies": round(raw_slowed, 3),
        "loops_beside_a_capture": statistics.median(beside),
        "rate_over_raw_copy": round(statistics.median(rate), 3),
        "raw_copy_gib_s": round(mib / 1024 / raw_seconds, 1),
        "call_ms": round(1e3 * statistics.median(call), 2),
        "gpu_mib_taken": taken_mib,
    }


def measure_restore(
    directory: Path, mib: int, rounds: int, device: str, tensors: int
) -> dict[str, object]:
    """Seconds of resume() over those of its ceilings, each the median of the rounds."""
    state = make_state(mib, device, tensors)
    back_seconds = RawCopy(state, device).seconds(comes_back=True)
    run = directory / f"restore-{tensors}"
    options = {"model": state, "keep_last": 1}
    with stillframe.Checkpointer(run, **options) as checkpointer:
        checkpointer.save(0).wait("durable", timeout=300)
        checkpoint = next(run.glob("0*"))
        memory = []
        for _ in range(rounds):
            settle(device)
            begin = time.perf_counter()
            restored = checkpointer.resume()
            settle(device)
            memory.append(back_seconds / (time.perf_counter() - begin))
            assert restored is not None
            assert restored.source == "memory"
    disk, reads = [], []
    for _ in range(rounds):
        reads.append(read_seconds(checkpoint))
        drop_from_cache(checkpoint)
        # A session that has no snapshot of its own.
        with stillframe.Checkpointer(run, **options) as checkpointer:
            begin = time.perf_counter()
            restored = checkpointer.resume()
            settle(device)
            disk.append(reads[-1] / (time.perf_counter() - begin))
            assert restored is not None
            assert restored.source == "disk"
    return {
        "tensors": tensors,
        "memory_rate_over_raw_copy": round(statistics.median(memory), 3),
        "raw_copy_to_gpu_gib_s": round(mib / 1024 / back_seconds, 1),
        "disk_rate_over_plain_read": round(statistics.median(disk), 3),
        "plain_read_gib_s": round(mib / 1024 / statistics.median(reads), 2),
    }


def main() -> None:
    """Every lane, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, required=True, help="on the disk to use")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--mib", type=int, default=4096, help="of state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lanes", default=",".join(LANES), help="which of them, with commas")
    arguments = parser.parse_args()
    # Of the daemon that the first Checkpointer starts.
    os.environ["STILLFRAME_GPU_DRAIN_SHARE"] = "1"
    directory = arguments.directory / "stillframe-gpu-capture"
    shutil.rmtree(directory, ignore_errors=True)
    print(json.dumps({"benchmark": "gpu_capture", "mib": arguments.mib, **machine()}), flush=True)
    try:
        for lane in arguments.lanes.split(","):
            row = measure(lane, directory, arguments.mib, arguments.rounds, arguments.device)
            print(json.dumps({"benchmark": "gpu_capture_lane", **row}), flush=True)
        for tensors in (TENSORS, MANY_TENSORS):
            row = measure_restore(
                directory, arguments.mib, arguments.rounds, arguments.device, tensors
            )
            print(json.dumps({"benchmark": "gpu_restore", **row}), flush=True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
