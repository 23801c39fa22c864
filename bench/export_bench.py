"""Exports and imports beside a plain copy of the same bytes, and the memory that they need.

    python bench/export_bench.py --command build/release/stillframe --directory DIR [--mib 1024]

The ceiling is read + write + fsync of the model's part, in pieces of 4 MiB through the page cache,
which every contender finds empty. Prints one JSON line per figure: bytes per second of the model
beside the copy's in the same round, and the highest anonymous memory of any process that the
command started (for those with Python, without what it takes to import torch).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

from rounds import machine, ratio, run_rounds

MIB = 2**20
COPY_BYTES = 4 * MIB
IMPORTS = "import torch, torch.distributed.checkpoint, numpy, stillframe._convert.state"


def drop_cache(path: Path) -> None:
    """Take the files below `path` out of the page cache."""
    for file in [path] if path.is_file() else filter(Path.is_file, path.rglob("*")):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def plain_copy(source: Path, target: Path) -> float:
    """Seconds of read + write + fsync."""
    target.unlink(missing_ok=True)
    drop_cache(source)
    begin = time.monotonic()
    with open(source, "rb", buffering=0) as read, open(target, "wb", buffering=0) as write:
        while data := read.read(COPY_BYTES):
            write.write(data)
        os.fsync(write.fileno())
    return time.monotonic() - begin


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process, its children included; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    own = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
    below = [anonymous_bytes(int(child)) for child in children]
    return max([int(own[0]) * 1024 if own else 0, *below])


class Peak:
    """The highest anonymous memory of each contender."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    def run(self, name: str, words: list[str]) -> float:
        """Run a command; seconds until its end."""
        begin = time.monotonic()
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.005):
                self.bytes[name] = max(self.bytes.get(name, 0), anonymous_bytes(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        seconds = time.monotonic() - begin
        done.set()
        watcher.join()
        if code != 0:
            raise SystemExit(f"{' '.join(words)}: exit code {code}")
        return seconds


def import_cost() -> tuple[float, int]:
    """Seconds and anonymous bytes of a Python that imports what the converter does."""
    script = f"{IMPORTS}; print(open('/proc/self/status').read())"
    begin = time.monotonic()
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    line = next(line for line in out.stdout.splitlines() if line.startswith("RssAnon"))
    return time.monotonic() - begin, int(line.split()[1]) * 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--command", required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    os.environ["STILLFRAME_PYTHON"] = sys.executable
    directory = given.directory / "export-bench"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    run = directory / "run"
    # Half of it in one tensor, for whoever would hold one in memory.
    model = {f"layer{i:03d}.weight": torch.randn(4 * MIB) for i in range(given.mib // 32)}
    model["embedding.weight"] = torch.randn(given.mib // 2, MIB // 4)
    safetensors.torch.save_file(model, directory / "model.safetensors")
    del model
    import_words = [given.command, "import", str(directory / "model.safetensors")]
    subprocess.run([*import_words, str(run), "--from", "safetensors"], check=True)
    part = next(run.glob("0*")) / "model.safetensors"
    peak = Peak()

    def export(form: str) -> Callable[[], float]:
        def measure() -> float:
            drop_cache(run)
            target = str(directory / f"out-{form}")
            words = [given.command, "export", str(run), target, "--to", form, "--force"]
            return peak.run(f"export {form}", words)

        return measure

    def import_(form: str) -> Callable[[], float]:
        def measure() -> float:
            source = directory / f"out-{form}"
            drop_cache(source)
            target = directory / "imported"
            shutil.rmtree(target, ignore_errors=True)
            words = [given.command, "import", str(source), str(target), "--from", form]
            return peak.run(f"import {form}", words)

        return measure

    forms = ("safetensors", "hf", "torch", "dcp")
    for form in forms:
        export(form)()
    contenders = {f"export {form}": export(form) for form in forms}
    contenders |= {f"import {form}": import_(form) for form in forms}
    rounds, void_count = run_rounds(
        lambda: plain_copy(part, directory / "copy"), contenders, given.rounds
    )
    import_seconds, import_bytes = import_cost()
    size = part.stat().st_size
    print(json.dumps({"machine": machine(), "bytes": size, "void_rounds": void_count}))
    copy_rate = size / min(one.calibrator for one in rounds) / 1e9
    for name in contenders:
        has_python = name.endswith(("torch", "dcp"))
        slower = ratio([one.seconds[name] for one in rounds], [one.calibrator for one in rounds])
        print(
            json.dumps(
                {
                    "figure": f"{name} / read + write + fsync",
                    "rate_ratio": round(1 / slower.median, 3),
                    "range": [round(1 / slower.high, 3), round(1 / slower.low, 3)],
                    "copy_gb_per_s": round(copy_rate, 3),
                    "start_of_python_s": round(import_seconds, 2) if has_python else 0,
                    "anonymous_mib": round(peak.bytes[name] / MIB, 1),
                    "of_it_imports_mib": round(import_bytes / MIB, 1) if has_python else 0,
                }
            )
        )
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
