"""Runs the benchmark programs one after another and keeps what they print.

Called by scripts/bench. Each program prints JSON Lines; they go, behind a line with the facts of
machine and disk, to bench/results/<date>-<kind of machine>/<name>.jsonl.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELEASE = ROOT / "build" / "release"


@dataclass(frozen=True)
class Benchmark:
    """One program. In its words, {bin}, {dir} and {python} stand for what their names say.

    Attributes:
        quick: its words in a run of all.
        thorough: its words with --thorough: enough rounds for an interval worth quoting.
    """

    name: str
    command: str
    quick: str = ""
    thorough: str = ""
    timeout_s: int = 120


# The quick ones together in under five minutes on two cores.
BENCHMARKS = (
    Benchmark("capture", "{bin}/capture_bench"),
    Benchmark(
        "persist",
        "{bin}/persist_bench --path {dir}",
        quick="--rounds 2 --fresh-rounds 1",
        thorough="--rounds 7 --fresh-rounds 3",
    ),
    Benchmark(
        "save",
        "{bin}/save_bench --path {dir} --daemon {bin}/stillframed",
        quick="--rounds 3",
        thorough="--rounds 9",
    ),
    Benchmark(
        "torch",
        "{python} bench/torch_bench.py --raw {bin}/raw_bench --directory {dir}",
        quick="--quick",
    ),
    Benchmark(
        "train_slowdown",
        "{python} bench/train_slowdown.py --directory {dir}",
        quick="--quick",
        thorough="--rounds 3 --checkpoints 6",
        timeout_s=180,
    ),
)
# How much longer a thorough one may take.
_PATIENCE = 8


def cpu_model() -> str:
    """As the kernel names it, such as "AMD EPYC 9B14"."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1) if match else platform.machine()


def git(*words: str) -> str:
    """What git answers, without the end of the line; "" where it cannot."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def kernel_says(path: Path) -> str:
    """The first line of a file of /sys or /proc; "unknown" where there is none."""
    try:
        return path.read_text(encoding="utf-8").split("\n", 1)[0].strip()
    except OSError:
        return "unknown"


def disk_facts(directory: Path) -> dict[str, str | int]:
    """The file system of `directory` and the queue of its block device."""
    device = directory.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    kind, options = "unknown", "unknown"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        before, _, after = line.partition(" - ")
        # Of several mounts of one device the last is the one on top.
        if before.split()[2] == number:
            kind = after.split()[0]
            words = f"{before.split()[5]},{after.split()[2]}".split(",")
            options = ",".join(sorted({word for word in words if "/" not in word}))
    block = Path("/sys/dev/block") / number
    # A partition has its disk's queue.
    queue = block / "queue" if (block / "queue").exists() else block.resolve().parent / "queue"
    space = os.statvfs(directory)
    return {
        "file_system": kind,
        "mount_options": options,
        **{
            name: kernel_says(queue / name)
            for name in (
                "rotational",
                "scheduler",
                "max_segments",
                "max_sectors_kb",
                "write_cache",
                "io_poll",
            )
        },
        "free_gib": space.f_bavail * space.f_frsize >> 30,
        "used_percent": round(100 * (1 - space.f_bfree / max(1, space.f_blocks))),
    }


def machine_facts() -> dict[str, str | int | bool]:
    """What a later reader needs to judge the numbers; no names of hosts, users or paths."""
    return {
        "cpu": cpu_model(),
        "cpus": os.cpu_count() or 0,
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "commit": git("rev-parse", "--short=12", "HEAD") or "unknown",
        "has_local_changes": bool(git("status", "--porcelain")),
        "thp": kernel_says(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "shmem_thp": kernel_says(Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        "memlock_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
    }


def run(
    benchmark: Benchmark,
    scratch: Path,
    results: Path,
    facts: dict[str, str | int | bool],
    *,
    is_thorough: bool,
) -> bool:
    """Runs one program, shows and keeps what it prints. False: it failed or gave no JSON."""
    words = {"bin": str(RELEASE), "dir": str(scratch), "python": sys.executable}
    said = f"{benchmark.command} {benchmark.thorough if is_thorough else benchmark.quick}".strip()
    command = [word.format(**words) for word in said.split()]
    # The commands of the installed package come before any other of the same name.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    print(f"--- {benchmark.name}", flush=True)
    started = time.monotonic()
    header = {
        "kind": "machine",
        "benchmark": benchmark.name,
        "command": said,
        "utc": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "load": os.getloadavg()[0],
        **facts,
        "disk": disk_facts(scratch),
    }
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            timeout=benchmark.timeout_s * (_PATIENCE if is_thorough else 1),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{benchmark.name}: {error}", file=sys.stderr)
        return False
    print(done.stdout, end="")
    print(f"{time.monotonic() - started:.0f} s")
    lines = []
    for line in done.stdout.splitlines():
        try:
            json.loads(line)
        except ValueError:
            continue
        lines.append(line + "\n")
    if lines:
        text = "".join([json.dumps(header) + "\n", *lines])
        (results / f"{benchmark.name}.jsonl").write_text(text, encoding="utf-8")
    if done.returncode != 0:
        print(f"{benchmark.name}: ended with status {done.returncode}", file=sys.stderr)
    return done.returncode == 0 and bool(lines)


def main() -> int:
    """Exit status: 0 all ran, 1 some failed. A missed target is a figure, not a failure."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Runs the benchmarks.")
    parser.add_argument("--directory", type=Path, default=ROOT / "build" / "bench-scratch")
    parser.add_argument("--only", choices=[one.name for one in BENCHMARKS])
    parser.add_argument(
        "--thorough", action="store_true", help="more rounds, for figures to quote; half an hour"
    )
    parser.add_argument("--list", action="store_true", help="name them and stop")
    arguments = parser.parse_args()
    chosen = [one for one in BENCHMARKS if arguments.only in (None, one.name)]
    if arguments.list:
        print("\n".join(one.name for one in chosen))
        return 0

    facts = machine_facts()
    kind = re.sub(r"[^a-z0-9]+", "-", f"{facts['cpu']}-{facts['cpus']}cpu".lower()).strip("-")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    results = ROOT / "bench" / "results" / f"{today}-{kind}"
    results.mkdir(parents=True, exist_ok=True)

    failed = []
    for benchmark in chosen:
        scratch = arguments.directory / f"stillframe-bench-{benchmark.name}"
        scratch.mkdir(parents=True, exist_ok=True)
        try:
            if not run(benchmark, scratch, results, facts, is_thorough=arguments.thorough):
                failed.append(benchmark.name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    print(f"results: {results.relative_to(ROOT)}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
