"""Rounds, calibrators and ratios for the Python benchmarks: the protocol of docs/BENCHMARKS.md.

Each round runs every contender once, in rotated order, with the raw calibrator first and last. A
figure is the median over rounds of contender / mean calibrator of the same round, with its range; a
round whose two calibrators differ by more than 20 % is void and repeated.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

VOID_ABOVE = 0.20
ATTEMPTS_PER_ROUND = 3
BOOTSTRAP_SAMPLES = 10_000


@dataclasses.dataclass
class Round:
    """Seconds of each contender and of the two calibrator runs."""

    calibrators: tuple[float, float]
    seconds: dict[str, float]

    @property
    def is_void(self) -> bool:
        """Whether the machine changed its speed by more than 20 % within the round."""
        low, high = sorted(self.calibrators)
        return high > low * (1 + VOID_ABOVE)

    @property
    def calibrator(self) -> float:
        """Mean seconds of the two calibrator runs."""
        return sum(self.calibrators) / 2


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Median, range and bootstrap 95 % interval of one ratio over the valid rounds."""

    median: float
    low: float
    high: float
    interval: tuple[float, float]


def run_rounds(
    calibrate: Callable[[], float],
    contenders: dict[str, Callable[[], float]],
    count: int,
) -> tuple[list[Round], int]:
    """Run rounds until `count` are valid or 3 x `count` were tried.

    Returns:
        The rounds to use and the number of void ones among all tried. Where too few were valid, the
        void ones count as well: the caller prints their number.
    """
    names = list(contenders)
    valid: list[Round] = []
    void: list[Round] = []
    for attempt in range(count * ATTEMPTS_PER_ROUND):
        if len(valid) == count:
            break
        order = names[attempt % len(names) :] + names[: attempt % len(names)]
        first = calibrate()
        seconds = {name: contenders[name]() for name in order}
        one = Round((first, calibrate()), seconds)
        (void if one.is_void else valid).append(one)
    return (valid + void)[:count], len(void)


def ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int = 1) -> Ratio:
    """The ratio round by round: its median, range and bootstrap interval over whole rounds."""
    values = [a / b for a, b in zip(numerators, denominators, strict=True)]
    generator = random.Random(seed)
    medians = sorted(
        statistics.median(generator.choices(values, k=len(values)))
        for _ in range(BOOTSTRAP_SAMPLES)
    )
    interval = (medians[int(0.025 * len(medians))], medians[int(0.975 * len(medians))])
    return Ratio(statistics.median(values), min(values), max(values), interval)


def process_cpu_seconds(pid: int | None = None) -> float:
    """User and system seconds of this process, or of another by its /proc entry (10 ms grain)."""
    if pid is None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def raw_seconds(program: Path, *arguments: str) -> float:
    """Run a calibrator of bench/raw and return the seconds that it measured itself."""
    output = subprocess.run(
        [program, *arguments], check=True, capture_output=True, text=True
    ).stdout
    return float(json.loads(output)["seconds"])


def machine() -> dict[str, object]:
    """Facts about this machine that a reader of the figures needs. No names, no paths."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "memory_gib": round(memory_kib / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
