"""How long a deployment waits for its model: load_model() beside torch.load(), and save beside it.

    python bench/model_bench.py --raw build/release/raw_bench --directory DIR [--quick]

Each load runs in a fresh process that has done its imports, from a file that the page cache has
dropped, until one element of every 4 KiB page of every parameter was read: then all of the model is
in memory, mapped or not. Peers build their model on the meta device and assign what they loaded,
the fastest way that they have. Prints one JSON line per figure, each beside the drive's own rate.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import stillframe.torch as stillframe
from rounds import machine, ratio, raw_seconds, run_rounds

MIB = 2**20

# Widths of the layers of a GiB: few large tensors, and many of about 2 MiB.
SHAPES = {"16_tensors_of_64_mib": (16, 4096, 4096), "455_tensors_of_2.25_mib": (455, 768, 768)}
WARM_UP = "warm_up"


def make_model(shape: str) -> nn.Module:
    """A stack of linear layers, 1 GiB of fp32 in all."""
    count, inputs, outputs = SHAPES.get(shape, (2, 64, 64))
    return nn.Sequential(*(nn.Linear(inputs, outputs, bias=False) for _ in range(count)))


def touch(model: nn.Module) -> float:
    """Read one element of every page."""
    return sum(float(one.detach().reshape(-1)[::1024].sum()) for one in model.parameters())


def load_with_torch(path: str, shape: str, *, mmap: bool) -> nn.Module:
    """The best that torch.load() can do for a state_dict."""
    with torch.device("meta"):
        model = make_model(shape)
    model.load_state_dict(torch.load(path, mmap=mmap), assign=True)
    return model.eval()


def load_with_safetensors(path: str, shape: str) -> nn.Module:
    """The same for safetensors."""
    from safetensors.torch import load_file

    with torch.device("meta"):
        model = make_model(shape)
    model.load_state_dict(load_file(path), assign=True)
    return model.eval()


def loaders(directory: Path, shape: str) -> dict[str, tuple[Path, Callable[[], nn.Module]]]:
    """Every contender: the file that it reads, and how."""
    ours = directory / f"{shape}.model"
    state = directory / f"{shape}.pt"
    part = ours / "model.safetensors"
    return {
        "stillframe": (part, lambda: stillframe.load_model(ours)),
        "stillframe_mmap": (part, lambda: stillframe.load_model(ours, mmap=True)),
        "torch_load": (state, lambda: load_with_torch(str(state), shape, mmap=False)),
        "torch_load_mmap": (state, lambda: load_with_torch(str(state), shape, mmap=True)),
        "safetensors": (part, lambda: load_with_safetensors(str(part), shape)),
    }


def drop_from_cache(path: Path) -> None:
    """Make the next read of a file come from the drive."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _use_memory(size: int, *, huge: bool) -> None:
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        for begin in range(0, size, 4096):
            memory[begin] = 1


def child(directory: Path, shape: str, name: str) -> None:
    """In a fresh process: load once, print the seconds."""
    # Imports are excluded, also those that a loader makes at its first use.
    touch(loaders(directory, WARM_UP)[name][1]())
    path, load = loaders(directory, shape)[name]
    drop_from_cache(path)
    # A virtual machine gets its memory page by page from its host, at many times the cost of a page
    # fault; so let all contenders find memory that was in use before, in pages of both sizes.
    for huge in (False, True):
        _use_memory(3 * 2**30, huge=huge)
    begin = time.perf_counter()
    touch(load())
    print(time.perf_counter() - begin)


def in_fresh_process(directory: Path, shape: str, name: str) -> float:
    """Seconds of one load."""
    return float(
        subprocess.run(
            [sys.executable, __file__, "--directory", directory, "--child", shape, name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )


def compare_loads(directory: Path, shape: str, raw: Callable[[], float], count: int) -> None:
    """Rounds of every contender with the drive's raw read rate around them."""
    for one in (WARM_UP, shape):
        model = make_model(one)
        stillframe.save_model(model, directory / f"{one}.model")
        torch.save(model.state_dict(), directory / f"{one}.pt")
        del model
    names = list(loaders(directory, shape))
    contenders: dict[str, Callable[[], float]] = {
        name: lambda name=name: in_fresh_process(directory, shape, name)  # type: ignore[misc]
        for name in names
    }
    rounds, void = run_rounds(raw, contenders, count)
    raws = [one.calibrator for one in rounds]
    ours = [one.seconds["stillframe"] for one in rounds]
    figures: dict[str, object] = {
        "raw_read_gib_per_s": 1 / statistics.median(raws),
        "rounds": len(rounds),
        "void": void,
    }
    for name in names:
        seconds = [one.seconds[name] for one in rounds]
        figures[f"{name}_seconds"] = statistics.median(seconds)
        against = ratio(raws, seconds) if name == "stillframe" else ratio(seconds, ours)
        label = "of_raw_read" if name == "stillframe" else f"faster_than_{name}"
        figures[label] = {
            "median": round(against.median, 3),
            "range": [round(against.low, 3), round(against.high, 3)],
        }
    report(f"load_1_gib_{shape}", **figures, target=[0.8, 1.5, 1.0])


def compare_saves(directory: Path, raw: Callable[[], float], count: int) -> None:
    """save() and save_model() beside torch.save() with fsync, and the drive's raw write rate."""
    model = make_model("16_tensors_of_64_mib")
    state = model.state_dict()

    def ours_file() -> None:
        stillframe.save(state, directory / "save.stillframe")

    def ours_model() -> None:
        stillframe.save_model(model, directory / "save.model")

    def theirs() -> None:
        with (directory / "save.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def timed(save: Callable[[], None]) -> Callable[[], float]:
        def run() -> float:
            begin = time.perf_counter()
            save()
            return time.perf_counter() - begin

        return run

    contenders = {
        "save": timed(ours_file),
        "save_model": timed(ours_model),
        "torch_save_fsync": timed(theirs),
    }
    rounds, void = run_rounds(raw, contenders, count)
    raws = [one.calibrator for one in rounds]
    figures: dict[str, object] = {"rounds": len(rounds), "void": void}
    for name in contenders:
        seconds = [one.seconds[name] for one in rounds]
        figures[f"{name}_seconds"] = statistics.median(seconds)
        figures[f"{name}_of_raw_write"] = round(ratio(raws, seconds).median, 3)
    report("durable_save_1_gib", **figures)


def report(name: str, **figures: object) -> None:
    """One line of JSON."""
    print(json.dumps({"figure": name, **figures}), flush=True)


def main() -> None:
    """Run all figures in a scratch directory under --directory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", type=Path, help="the raw_bench calibrator")
    parser.add_argument(
        "--directory", type=Path, required=True, help="a directory on the disk to measure"
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 7")
    parser.add_argument("--only", help="figures whose name has this in it")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.child is not None:
        child(arguments.directory, *arguments.child)
        return
    if arguments.raw is None:
        parser.error("--raw is needed")
    count = 3 if arguments.quick else 7
    report("machine", **machine(), torch=torch.__version__)
    directory = arguments.directory / "stillframe-model-bench"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)

    def raw(what: str) -> Callable[[], float]:
        return lambda: raw_seconds(
            arguments.raw, what, "--path", str(directory / "raw"), "--mib", "1024"
        )

    try:
        for shape in SHAPES:
            if arguments.only is None or arguments.only in shape:
                compare_loads(directory, shape, raw("read"), count)
        if arguments.only is None or arguments.only in "save":
            compare_saves(directory, raw("write"), count)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
