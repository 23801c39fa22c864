"""What a capture of each lane costs a GPU that computes meanwhile, and how fast it is.

    gpu_capture.py --directory DIR [--device cuda|cpu] [--mib N] [--rounds N]

For each lane, beside a ceiling of the same run: the time of a loop of matrix products while a
capture is under way over the time without one; the seconds from save() to "captured" over those of
one copy of the same bytes to page-locked memory, with the worker's pauses off; and the memory of
the GPU that the first save took, a worker's context with it. Prints JSON Lines. On the CPU it shows
only that it runs.
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
PRODUCTS = 20


class Loop:
    """Matrix products that leave the state alone."""

    def __init__(self, device: str) -> None:
        size = 4096 if device == "cuda" else 256
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.device = device
        self.left, self.right, self.out = (
            torch.randn(size, size, device=device, dtype=dtype) for _ in range(3)
        )

    def seconds(self) -> float:
        """Of some products, from an idle GPU to an idle GPU."""
        settle(self.device)
        begin = time.perf_counter()
        for _ in range(PRODUCTS):
            torch.mm(self.left, self.right, out=self.out)
        settle(self.device)
        return time.perf_counter() - begin


def settle(device: str) -> None:
    """Wait until a GPU has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def free_mib(device: str) -> int:
    """What is left of the GPU's memory, whoever has it."""
    return torch.cuda.mem_get_info()[0] >> 20 if device == "cuda" else 0


def raw_copy_seconds(state: torch.nn.Module, device: str) -> float:
    """One copy of each tensor to page-locked memory."""
    tensors = [one.detach() for one in state.parameters()]
    staged = [torch.empty_like(one, device="cpu", pin_memory=device == "cuda") for one in tensors]
    taken = []
    for _ in range(3):
        settle(device)
        begin = time.perf_counter()
        for target, one in zip(staged, tensors, strict=True):
            target.copy_(one, non_blocking=True)
        settle(device)
        taken.append(time.perf_counter() - begin)
    return min(taken)


def measure(lane: str, directory: Path, mib: int, rounds: int, device: str) -> dict[str, object]:
    """One lane: its ratios, each the median of the rounds."""
    width = int((mib * 2**20 / 4 / TENSORS) ** 0.5)
    layers = [torch.nn.Linear(width, width, bias=False) for _ in range(TENSORS)]
    state = torch.nn.Sequential(*layers).to(device)
    optimizer = torch.optim.SGD(state.parameters(), lr=0.1)
    raw_seconds = raw_copy_seconds(state, device)
    loop = Loop(device)
    loop.seconds()
    before = free_mib(device)
    slower, rate, beside = [], [], []
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
        "loops_beside_a_capture": statistics.median(beside),
        "rate_over_raw_copy": round(statistics.median(rate), 3),
        "raw_copy_gib_s": round(mib / 1024 / raw_seconds, 1),
        "gpu_mib_taken": taken_mib,
    }


def main() -> None:
    """Every lane, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, required=True, help="on the disk to use")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--mib", type=int, default=4096, help="of state")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    # Of the daemon that the first Checkpointer starts.
    os.environ["STILLFRAME_GPU_DRAIN_SHARE"] = "1"
    directory = arguments.directory / "stillframe-gpu-capture"
    shutil.rmtree(directory, ignore_errors=True)
    print(json.dumps({"benchmark": "gpu_capture", "mib": arguments.mib, **machine()}), flush=True)
    try:
        for lane in LANES:
            row = measure(lane, directory, arguments.mib, arguments.rounds, arguments.device)
            print(json.dumps({"benchmark": "gpu_capture_lane", **row}), flush=True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
