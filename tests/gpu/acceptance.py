"""Proves Stillframe on the GPU of this machine, or on the simulated driver to try itself out.

    gpu-acceptance {correctness|figures|faults} [--output DIR] [--quick] [--simulated]

Each part takes less than nine minutes and writes a Markdown and a JSON file to DIR as it goes; what
a file holds already is not run again, so that a part that was cut short goes on. The exit status is
1 if anything failed. Needs no network and no root.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

BUNDLE = Path(__file__).resolve().parents[2]
BIN = BUNDLE / "bin"
GPU_TESTS = BIN / "gpu_lane_acceptance"
# A part is called with ten minutes at most.
PART_SECONDS = 8.5 * 60
TRAINING_STEPS = 60
# Checks that share the GPU, each with daemons and trainers of its own.
AT_ONCE = 6
LANES = ("pinned", "hbm", "ipc")


class Report:
    """What one part has found so far, kept on disk after each check."""

    def __init__(self, part: str, output: Path, facts: dict[str, Any]) -> None:
        self._json = output / f"{part}.json"
        self._markdown = output / f"{part}.md"
        self._facts = facts
        self._checks: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        if self._json.exists():
            self._checks = json.loads(self._json.read_text())["checks"]
        self._ends = time.monotonic() + PART_SECONDS

    def check(self, name: str, run: Callable[[float], dict[str, Any]]) -> None:
        """Run a check, unless it is done; `run` gets its seconds and returns what it found."""
        if self._checks.get(name, {}).get("passed"):
            return
        rest = self._ends - time.monotonic()
        if rest < 10:
            self._note(name, {"passed": False, "found": "no time was left; call this part again"})
            return
        begin = time.monotonic()
        try:
            found = {"passed": True, **run(rest)}
        except (AssertionError, OSError, subprocess.SubprocessError, ValueError) as error:
            found = {"passed": False, "found": f"{type(error).__name__}: {error}"[:2000]}
        self._note(name, {**found, "seconds": round(time.monotonic() - begin, 1)})

    def check_at_once(self, checks: dict[str, Callable[[float], dict[str, Any]]]) -> None:
        """Run several of them at the same time, on the same GPU."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(self.check, checks.keys(), checks.values()))

    def _note(self, name: str, found: dict[str, Any]) -> None:
        with self._lock:
            self._note_locked(name, found)

    def _note_locked(self, name: str, found: dict[str, Any]) -> None:
        self._checks[name] = found
        self._json.write_text(json.dumps({"facts": self._facts, "checks": self._checks}, indent=1))
        lines = [f"- {name}: {value}" for name, value in self._facts.items()]
        lines += ["", "| check | passed | found |", "| --- | --- | --- |"]
        for one, entry in self._checks.items():
            said = "; ".join(f"{k} {v}" for k, v in entry.items() if k not in ("passed", "rows"))
            lines.append(f"| {one} | {'yes' if entry['passed'] else 'NO'} | {said} |")
            lines += [f"| | | {row} |" for row in entry.get("rows", [])]
        self._markdown.write_text("\n".join(lines) + "\n")
        print(f"{'passed' if found['passed'] else 'FAILED'}  {name}: {found}", flush=True)

    @property
    def failed_count(self) -> int:
        """How many checks have not passed."""
        return sum(not entry["passed"] for entry in self._checks.values())


class Machine:
    """How programs are started here, and what is known of the machine."""

    def __init__(self, *, is_simulated: bool, is_quick: bool) -> None:
        self.is_simulated = is_simulated
        self.is_quick = is_quick
        self.environment = {
            **os.environ,
            "STILLFRAME_DAEMON": str(BIN / "stillframed"),
            "STILLFRAME_LIBRARY": str(BUNDLE / "lib" / "libstillframe.so"),
            "PYTHONPATH": os.pathsep.join([str(BUNDLE / "python"), str(BUNDLE / "bench")]),
        }
        # Modules of the machine's own come first.
        lacks = subprocess.run(
            [sys.executable, "-c", "import numpy, safetensors"], capture_output=True, check=False
        ).returncode
        if lacks:
            self.environment["PYTHONPATH"] += f"{os.pathsep}{BUNDLE / 'vendor'}"
        if is_simulated:
            self.environment["LD_LIBRARY_PATH"] = str(BIN / "simulated")

    @property
    def device(self) -> str:
        """Of torch, which knows no simulated GPU."""
        return "cpu" if self.is_simulated else "cuda"

    def run(self, command: list[Any], seconds: float, **more: str) -> str:
        """Output of a command that must succeed."""
        done = subprocess.run(
            [str(word) for word in command],
            env={**self.environment, **more},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, f"status {done.returncode}: {done.stdout[-1500:]}"
        return done.stdout

    def facts(self) -> dict[str, Any]:
        """Date, GPUs, driver, limits: the first lines of every report."""
        doctor = json.loads(self.run([BIN / "stillframe", "doctor", "/tmp", "--json"], 60))
        facts: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "driver": "SIMULATED: no result of a GPU" if self.is_simulated else _driver(),
        }
        for finding in doctor["findings"]:
            facts[finding["subject"]] = finding["fact"]
        return facts


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version,pcie.link.gen.current", "--format=csv"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"


def lane_tests(
    machine: Machine, filter_: str, repeats: int, seconds: float, **more: str
) -> dict[str, Any]:
    """The GoogleTest program on this driver; every round has a seed of its own."""
    command = [GPU_TESTS, f"--gtest_filter={filter_}", f"--gtest_repeat={repeats}"]
    output = machine.run([*command, "--gtest_fail_fast", "--gtest_brief=0"], seconds, **more)
    counts = [int(one) for one in re.findall(r"^\[  PASSED  \] (\d+) test", output, re.M)]
    assert len(counts) == repeats, output[-800:]
    assert min(counts) > 0, "no test ran"
    return {"tests passed": sum(counts)}


def killed_training(
    machine: Machine, lane: str, configuration: str, seconds: float
) -> dict[str, Any]:
    """Kills a training three times; it must end as one that never was, bit for bit."""
    ends = time.monotonic() + seconds
    # Tests want no memory of a training before.
    with tempfile.TemporaryDirectory() as folder:
        more = {"PYTORCH_CUDA_ALLOC_CONF": configuration} if configuration else {}
        more["STILLFRAME_SOCKET"] = f"{folder}/socket"
        steps = 12 if machine.is_quick else TRAINING_STEPS

        def command(run: str) -> list[str]:
            trainer = Path(__file__).with_name("train.py")
            options = ["--steps", str(steps), "--device", machine.device, "--lane", lane]
            return [
                *(sys.executable, str(trainer), f"{folder}/{run}", *options),
                *("--journal", f"{folder}/{run}.jsonl"),
            ]

        daemon = subprocess.Popen(
            [BIN / "stillframed", f"--socket={folder}/socket", "--log-level=error"],
            env=machine.environment,
        )
        try:
            machine.run(command("straight"), ends - time.monotonic(), **more)
            # The last one is to save once more, or it has used no lane.
            instants = sorted(random.SystemRandom().sample(range(1, steps - 5), 3))
            for instant in instants:
                _kill_after(command("killed"), {**machine.environment, **more}, instant)
            machine.run(command("killed"), ends - time.monotonic(), **more)
        finally:
            daemon.terminate()
            daemon.wait()
        journals = {
            run: [
                json.loads(line) for line in Path(folder, f"{run}.jsonl").read_text().splitlines()
            ]
            for run in ("straight", "killed")
        }
        straight, killed = journals["straight"][-1], journals["killed"][-1]
        assert straight["kind"] == killed["kind"] == "end", journals
        for key in ("digest", "losses"):
            assert straight[key] == killed[key], f"{key} differs, killed after {instants}"
        resumes = [entry["step"] for entry in journals["killed"] if entry["kind"] == "resume"]
        wanted = "host" if machine.is_simulated else lane
        assert killed["lane"] == wanted, killed
        return {"killed after": instants, "went on at": resumes, "lane": killed["lane"]}


def _kill_after(command: list[str], environment: dict[str, str], step: int) -> None:
    trainer = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    for line in trainer.stdout:
        if line.startswith("step ") and int(line.split()[1]) >= step:
            break
    time.sleep(random.uniform(0, 0.05))
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()


def _json_lines(output: str) -> list[dict[str, Any]]:
    """What a benchmark has found, among what it says meanwhile."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def kernel_figures(machine: Machine, seconds: float) -> dict[str, Any]:
    """Packing beside a plain copy kernel."""
    command = [BIN / "gpu_bench"]
    if machine.is_simulated:
        command += ["--mib", "2", "--rounds", "1", "--void-above", "1e9"]
    else:
        command += ["--mib", "1024"]
    rows = _json_lines(machine.run(command, seconds))
    ratios = [row for row in rows if "median" in row]
    assert ratios, rows
    return {"rows": [json.dumps(row) for row in ratios]}


def training_figures(machine: Machine, seconds: float) -> dict[str, Any]:
    """Lost step time per checkpoint of each lane, beside other ways to save."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        command = [sys.executable, BUNDLE / "bench" / "train_slowdown.py", "--directory", folder]
        command += ["--device", machine.device]
        if machine.is_simulated:
            command += ["--quick", "--checkpoints", "1", "--width", "256"]
        else:
            command += ["--rounds", "2", "--checkpoints", "3"]
        output = machine.run(command, seconds)
    rows = _json_lines(output)
    summaries = [row for row in rows if "lost_ms_per_checkpoint" in row]
    assert summaries, output[-800:]
    assert all(row["weights_equal"] and row["checkpoint_equals_replay"] for row in summaries)
    return {"rows": [json.dumps(row) for row in summaries]}


def capture_figures(machine: Machine, seconds: float) -> dict[str, Any]:
    """Of each lane a loop of products beside a capture, the rate, memory taken; restores."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        command = [sys.executable, BUNDLE / "bench" / "gpu_capture.py", "--directory", folder]
        command += ["--device", machine.device]
        size = ("32", "1") if machine.is_simulated else ("1024", "3")
        command += ["--mib", size[0], "--rounds", size[1]]
        output = machine.run(command, seconds, STILLFRAME_SOCKET="", XDG_RUNTIME_DIR=folder)
    rows = _json_lines(output)
    lanes = [row for row in rows if row["benchmark"] == "gpu_capture_lane"]
    assert [row["lane"] for row in lanes] == list(LANES), output[-800:]
    if not machine.is_simulated:
        assert all(row["lane_in_use"] == row["lane"] for row in lanes), lanes
    return {"rows": [json.dumps(row) for row in rows[1:]]}


def correctness(machine: Machine, report: Report) -> None:
    """Every test of the lanes, random layouts through them; real trainings that are killed."""
    repeats = 1 if machine.is_quick else 20
    checks: dict[str, Callable[[float], dict[str, Any]]] = {
        "every test of the lanes": lambda rest: lane_tests(machine, "*-*any_layout*", 1, rest),
        "any layout, both ways": lambda rest: lane_tests(
            machine, "*any_layout*:*many_chunks*", repeats, rest
        ),
    }
    allocators = ("", "expandable_segments:True")
    trainings = [(lane, allocator) for lane in LANES for allocator in allocators]
    # Which are one and the same to torch without a GPU.
    for lane, allocator in trainings[:1] if machine.is_simulated else trainings:
        name = f"a training killed three times, lane {lane}, {allocator or 'plain allocator'}"
        checks[name] = lambda rest, to=lane, c=allocator: killed_training(machine, to, c, rest)  # type: ignore[misc]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("skipped  compute-sanitizer: it is not installed", flush=True)
    else:
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes"]
            command += ["application-only", GPU_TESTS, "--gtest_filter=*any_layout*"]
            checks[f"compute-sanitizer {tool}"] = lambda rest, c=command: {  # type: ignore[misc]
                "last line": machine.run(c, rest).splitlines()[-1]
            }
    report.check_at_once(checks)


def figures(machine: Machine, report: Report) -> None:
    """Each figure beside its ceiling of the same run."""
    report.check("kernels", lambda rest: kernel_figures(machine, rest))
    report.check("beside a capture", lambda rest: capture_figures(machine, rest))
    report.check("lost step time", lambda rest: training_figures(machine, rest))


def faults(machine: Machine, report: Report) -> None:
    """What goes wrong, again and again: a hundred times and more, over the lanes."""
    in_each = 2 if machine.is_quick else 34  # Lane, where a test has one.
    before = 0 if machine.is_simulated else _memory_used()

    def repeated(filter_: str, repeats: int, **more: str) -> Callable[[float], dict[str, Any]]:
        return lambda rest: lane_tests(machine, filter_, repeats, rest, **more)

    kills = str(in_each * 3 // 2)
    report.check_at_once(
        {
            "captures given up, their memory freed at once": repeated(
                "*voided_reads*",
                in_each // 2,  # Eight each.
            ),
            "captures given up": repeated("*voided_leaves*", in_each),
            "daemons killed in a capture": repeated("*outlives_the_daemon*", in_each),
            # Up to a hundred captures, twice.
            "tensors changed during a capture": repeated("*change_meanwhile*", 1),
            "damage on the drive": repeated("*damaged_on_the_drive*", in_each),
            "random handles, plans and rings that are not theirs": repeated("Hostile*", in_each),
            f"trainers killed at random instants, {kills} in each lane": repeated(
                "*CrashingTrainer.that_is_killed*", 1, STILLFRAME_KILLS=kills
            ),
            f"trainers whose GPU breaks in a save, {in_each} in each lane": repeated(
                "*CrashingTrainer.whose_gpu_breaks*", 1, STILLFRAME_KILLS=str(in_each)
            ),
            f"workers killed at random instants, {kills} in each lane": repeated(
                "*that_dies_during_a_copy*", 1, STILLFRAME_KILLS=kills
            ),
            f"workers whose GPU breaks in a save, {kills} in each lane": repeated(
                "*GpuWorker.whose_gpu_breaks*", 1, STILLFRAME_KILLS=kills
            ),
        }
    )
    # It leaves no memory to others.
    report.check("GPUs without memory", repeated("*on_a_gpu_without_memory*", in_each))
    if not machine.is_simulated:
        report.check("GPU memory is back at its baseline", lambda rest: _compare_memory(before))


def _memory_used() -> int:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    found = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    return sum(int(line) for line in found.split())


def _compare_memory(before: int) -> dict[str, Any]:
    # Workers end some time after their last client.
    for _ in range(20):
        after = _memory_used()
        if after <= before:
            break
        time.sleep(0.5)
    assert abs(after - before) <= 16, f"{before} MiB before, {after} MiB after"
    return {"MiB before": before, "MiB after": after}


def main() -> int:
    """Exit status: 0 all passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("correctness", "figures", "faults"))
    parser.add_argument("--output", type=Path, default=Path("gpu-acceptance-results"))
    parser.add_argument("--quick", action="store_true", help="few repetitions, to try it out")
    parser.add_argument("--simulated", action="store_true", help="on the simulated driver")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    machine = Machine(is_simulated=arguments.simulated, is_quick=arguments.quick)
    report = Report(arguments.part, arguments.output, machine.facts())
    {"correctness": correctness, "figures": figures, "faults": faults}[arguments.part](
        machine, report
    )
    return 1 if report.failed_count else 0


if __name__ == "__main__":
    sys.exit(main())
