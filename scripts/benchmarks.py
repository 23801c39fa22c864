"""Runs the benchmark programs one after another and keeps what they print.

Called by scripts/bench. Each program prints JSON Lines; they go to
bench/results/<date>-<kind of machine>/<name>.jsonl with the machine's facts beside them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
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
    """One program. In its words, {bin}, {dir} and {python} stand for what their names say."""

    name: str
    command: str
    timeout_s: int = 120


# All of it in under five minutes on two cores.
BENCHMARKS = (
    Benchmark("capture", "{bin}/capture_bench"),
    Benchmark("persist", "{bin}/persist_bench --path {dir}"),
    Benchmark("save", "{bin}/save_bench --path {dir} --daemon {bin}/stillframed"),
    Benchmark(
        "torch", "{python} bench/torch_bench.py --raw {bin}/raw_bench --directory {dir} --quick"
    ),
)


def cpu_model() -> str:
    """As the kernel names it, such as "AMD EPYC 9B14"."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1) if match else platform.machine()


def machine_facts() -> dict[str, str | int]:
    """What a later reader needs to judge the numbers; no names of hosts, users or paths."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "cpu": cpu_model(),
        "cpus": os.cpu_count() or 0,
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }


def run(benchmark: Benchmark, scratch: Path, results: Path) -> bool:
    """Runs one program, shows and keeps what it prints. False: it failed or gave no JSON."""
    words = {"bin": str(RELEASE), "dir": str(scratch), "python": sys.executable}
    command = [word.format(**words) for word in benchmark.command.split()]
    # The commands of the installed package come before any other of the same name.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    print(f"--- {benchmark.name}", flush=True)
    started = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            timeout=benchmark.timeout_s,
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
        (results / f"{benchmark.name}.jsonl").write_text("".join(lines), encoding="utf-8")
    if done.returncode != 0:
        print(f"{benchmark.name}: ended with status {done.returncode}", file=sys.stderr)
    return done.returncode == 0 and bool(lines)


def main() -> int:
    """Exit status: 0 all ran, 1 some failed. A missed target is a figure, not a failure."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Runs the benchmarks.")
    parser.add_argument("--directory", type=Path, default=ROOT / "build" / "bench-scratch")
    parser.add_argument("--only", choices=[one.name for one in BENCHMARKS])
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
    (results / "machine.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    failed = []
    for benchmark in chosen:
        scratch = arguments.directory / f"stillframe-bench-{benchmark.name}"
        scratch.mkdir(parents=True, exist_ok=True)
        try:
            if not run(benchmark, scratch, results):
                failed.append(benchmark.name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    print(f"results: {results.relative_to(ROOT)}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
