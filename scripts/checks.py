"""Builds and runs every check of the repository and adds up what they found.

Called by scripts/test, in the repository root, once scripts/setup is through. A check that is one
command counts as one; of ctest and pytest every test counts. A part that ran nothing has failed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "build" / "test-results"
PYTHON = sys.executable
VENV_BIN = Path(PYTHON).parent
JOBS = str(os.cpu_count() or 2)
# Of Python tests: each job imports every framework, some 2 GiB.
PYTHON_JOBS = str(min(os.cpu_count() or 2, 8))

# Of the sanitizers: stop at the first finding, with a stack. Tests fork, also beside threads.
SANITIZER_VARIABLES = {
    "asan": {
        "ASAN_OPTIONS": "strict_string_checks=1:detect_leaks=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    },
    "tsan": {"TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1:die_after_fork=0"},
}

CXX_FOLDERS = (
    *("base", "shm", "format", "uring", "catalog", "cuda", "kernels"),
    *("client", "daemon", "cli", "tests", "bench"),
)
PYTHON_FOLDERS = [
    name for name in ("python", "tests", "bench", "scripts", "examples") if (ROOT / name).is_dir()
]
# The tests of docs/RELIABILITY.md, but for those of the GPU path: suites of C++, files of Python.
FAULT_SUITES = (
    *("AnyArgument", "CrashEveryStep", "CrashingTrainer", "DaemonWithoutMemory", "EveryIoError"),
    *("FailingDevice", "FailingDrive", "Filesystem", "FilesystemCrash", "FullDisk", "FuzzReplay"),
    *("HostileClient", "HostileCrowd", "LyingDrive", "NoMemory", "PowerCut", "Rot", "RunOracle"),
    *("SimulatedDrive", "SpoolFiles"),
)
FAULT_FILES = ("tests/python/test_any_state.py", "tests/python/test_safetensors_differential.py")


@dataclass
class Tally:
    """What was found so far."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    remarks: list[str] = field(default_factory=list)  # One line for each failure and each skip.

    def fail(self, what: str) -> None:
        """Counts one failure."""
        self.failed += 1
        self.remarks.append(f"FAILED   {what}")

    def skip(self, what: str) -> None:
        """Counts one skip; `what` has its reason."""
        self.skipped += 1
        self.remarks.append(f"skipped  {what}")


def run(command: Sequence[str | Path], variables: dict[str, str] | None = None) -> int:
    """Exit status of `command`, whose output goes to ours, and with it the time that it took."""
    sys.stdout.flush()
    started = time.monotonic()
    result = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, **(variables or {})},
        stdin=subprocess.DEVNULL,
        check=False,
    )
    print(f"({time.monotonic() - started:.0f} s)", flush=True)
    return result.returncode


def check(tally: Tally, what: str, *command: str | Path) -> None:
    """One command, one verdict."""
    print(f"--- {what}", flush=True)
    if run(command) == 0:
        tally.passed += 1
    else:
        tally.fail(what)


def print_end(name: str, case: ElementTree.Element) -> None:
    """What a C++ test that failed said last; pytest has shown that itself."""
    output = case.findtext("system-out") or ""
    print(f"--- {name}", *output.splitlines()[-40:], sep="\n")


def count_junit(tally: Tally, part: str, status: int, file: Path) -> None:
    """Adds up the cases that ctest or pytest wrote to `file`."""
    failed_before = tally.failed
    cases = list(ElementTree.parse(file).iter("testcase")) if file.exists() else []
    for case in cases:
        group, own = case.get("classname", ""), case.get("name", "")
        # ctest gives the full name as both.
        name = f"{part}: {own if own.startswith(group) else f'{group}.{own}'}"
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            tally.fail(name)
            print_end(name, case)
        elif skipped is not None:
            tally.skip(f"{name}: {skipped.get('message', '')}"[:200])
        else:
            tally.passed += 1
    if not cases:
        tally.fail(f"{part}: no test ran")
    elif status != 0 and tally.failed == failed_before:
        tally.fail(f"{part}: ended with status {status}")


def without_address_randomisation() -> list[str]:
    """A prefix for TSan of GCC 12: the wide randomisation of new kernels hits its shadow."""
    prefix = ["setarch", "-R"]
    if shutil.which(prefix[0]) and run([*prefix, "true"]) == 0:
        return prefix
    return []  # Some containers refuse it; TSan then says so itself if it minds.


def run_cxx_tests(tally: Tally, preset: str, suites: Sequence[str] = ()) -> None:
    """Configures, builds and runs the C++ tests of one preset, all or those of `suites`."""
    print(f"--- C++ tests ({preset})", flush=True)
    prefix = without_address_randomisation() if preset == "tsan" else []
    variables = SANITIZER_VARIABLES.get(preset, {})
    report = RESULTS / f"ctest-{preset}.xml"
    report.unlink(missing_ok=True)
    if (
        run([*prefix, "cmake", "--preset", preset, "--log-level=WARNING"], variables) != 0
        or run([*prefix, "cmake", "--build", "--preset", preset], variables) != 0
    ):
        tally.fail(f"build ({preset})")
        return
    command = ["ctest", "--preset", preset, "-j", JOBS, "--progress", "--output-junit", str(report)]
    if suites:
        command += ["-R", rf"(^|/)({'|'.join(suites)})\."]
    count_junit(tally, f"C++ ({preset})", run([*prefix, *command], variables), report)


def run_python_tests(tally: Tally, paths: Sequence[str] = ("tests/python",)) -> None:
    """Runs the Python tests of `paths` against the package that is installed in .venv."""
    print("--- Python tests", flush=True)
    report = RESULTS / "pytest.xml"
    report.unlink(missing_ok=True)
    # The commands of the package come before any other of the same name.
    variables = {"PATH": f"{VENV_BIN}{os.pathsep}{os.environ['PATH']}"}
    command = [PYTHON, "-m", "pytest", "-q", "-rs", *paths, f"--junitxml={report}"]
    command += ["-n", PYTHON_JOBS, "--dist", "worksteal"]
    count_junit(tally, "Python", run(command, variables), report)


def cxx_files() -> list[str]:
    """Every C++ source and header of ours, relative to the root."""
    found: list[str] = []
    for folder in CXX_FOLDERS:
        for suffix in ("*.cc", "*.h"):
            found += [str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(suffix)]
    return sorted(found)


def lint(tally: Tally) -> None:
    """All that looks at sources without running them."""
    folder = Path("tests", "lint")
    for name in ("layering", "coroutine_temporaries", "words"):
        script = folder / f"{name}_test.py"
        check(tally, f"{name}, self-test", PYTHON, script, "--self-test")
        check(tally, name, PYTHON, script, ".")
    check(tally, "clang-format", "clang-format-14", "--dry-run", "-Werror", *cxx_files())
    check(tally, "ruff check", VENV_BIN / "ruff", "check", *PYTHON_FOLDERS)
    check(tally, "ruff format", VENV_BIN / "ruff", "format", "--check", *PYTHON_FOLDERS)
    check(tally, "mypy", VENV_BIN / "mypy", "--strict", "python/stillframe")
    imports = ["env", "PYTHONPATH=python", VENV_BIN / "lint-imports", "--no-cache"]
    check(tally, "folders of the package", *imports)
    check(tally, "reference is of the docstrings", PYTHON, "scripts/reference.py", "--check")
    check(tally, "planted bugs can be planted", "scripts/mutants", "--check")


def lint_headers(tally: Tally) -> None:
    """Needs the generated sources of the dev build."""
    script = Path("tests", "lint", "headers_compile_alone_test.py")
    check(tally, "headers compile alone, self-test", PYTHON, script, "--self-test")
    check(tally, "headers compile alone", PYTHON, script, ".", "build/dev")


def check_all(tally: Tally, is_quick: bool) -> None:
    """Everything, or all but what takes long."""
    lint(tally)
    run_cxx_tests(tally, "dev")
    lint_headers(tally)
    run_python_tests(tally)
    if is_quick:
        return
    for sanitizer in SANITIZER_VARIABLES:
        run_cxx_tests(tally, sanitizer)
    check(tally, "fuzz targets, 10 s each", "scripts/fuzz")
    check(tally, "soak of a minute", "scripts/soak")
    check(tally, "GPU acceptance, on the simulated driver", "scripts/gpu-bundle", "--try")


def check_faults(tally: Tally) -> None:
    """The part of it that docs/RELIABILITY.md is about."""
    for preset in ("dev", *SANITIZER_VARIABLES):
        run_cxx_tests(tally, preset, FAULT_SUITES)
    run_python_tests(tally, FAULT_FILES)
    check(tally, "fuzz targets, 10 s each", "scripts/fuzz")
    check(tally, "soak of a minute", "scripts/soak")


def main() -> int:
    """Exit status: 0 all passed or skipped, 1 something failed."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    tally = Tally()
    started = time.monotonic()
    if sys.argv[1:] == ["faults"]:
        check_faults(tally)
    else:
        check_all(tally, is_quick=sys.argv[1:] == ["quick"])

    print(f"\n{time.monotonic() - started:.0f} s")
    for remark in tally.remarks:
        print(remark)
    print(f"{tally.passed} passed, {tally.failed} failed, {tally.skipped} skipped")
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main())
