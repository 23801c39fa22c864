"""Plants each bug of tests/mutants/ in a copy of the sources and runs the tests that must notice.

Called by scripts/mutants. A mutant is a patch; above the diff it says what is wrong, and in lines
"Caught by: PROGRAM FILTER" which GoogleTest program must fail, with a filter for its tests. It
counts as caught if one of them fails, crashes or hangs, while without the patch all of them pass.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MUTANTS = ROOT / "tests" / "mutants"
SOURCE = ROOT / "build" / "mutants"  # Ignored by git, and a source tree of its own.
BUILD = SOURCE / "build" / "dev"
TIMEOUT_S = 120  # Several of them are caught by a hang; none of the tests takes half of it.
JOBS = str(os.cpu_count() or 2)


@dataclass(frozen=True)
class Catcher:
    """Some tests of one program."""

    program: str
    filter: str


@dataclass(frozen=True)
class Mutant:
    """One planted bug."""

    name: str
    bug: str
    catchers: tuple[Catcher, ...]
    patch: Path


@dataclass(frozen=True)
class Outcome:
    """How one run of a catcher ended.

    Attributes:
        passed: every test passed, and there was one.
        what: the first test that failed, or how the program ended.
    """

    passed: bool
    what: str


def read_mutant(patch: Path) -> Mutant:
    """Raises ValueError if the words above the diff are not as they must be."""
    words, _, _ = patch.read_text().partition("diff --git")
    catchers = tuple(
        Catcher(*pair) for pair in re.findall(r"^Caught by: (\S+) (\S+)$", words, re.M)
    )
    bug = words.splitlines()[0] if words else ""
    if not bug or not catchers:
        raise ValueError(f"{patch}: no first line that says what is wrong, or no 'Caught by:'")
    return Mutant(patch.stem, bug, catchers, patch)


def copy_sources() -> None:
    """Brings the copy up to date; files that are the same keep their times, for the build."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout
    wanted = {name for name in listed.decode().split("\0") if name and (ROOT / name).is_file()}
    for name in wanted:
        source, target = ROOT / name, SOURCE / name
        content = source.read_bytes()
        if target.is_file() and target.read_bytes() == content:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        target.chmod(source.stat().st_mode)
    for target in SOURCE.rglob("*"):
        is_ours = BUILD.parent not in target.parents and target.is_file()
        if is_ours and str(target.relative_to(SOURCE)) not in wanted:
            target.unlink()


def apply(mutant: Mutant, *options: str, directory: Path) -> bool:
    """`git apply`, which finds the place also where lines have moved."""
    command = ["git", "apply", "--unsafe-paths", "-C1", *options, str(mutant.patch)]
    # Without this the copy, inside our repository, would be taken for a part of it.
    variables = {**os.environ, "GIT_CEILING_DIRECTORIES": str(directory.parent)}
    return subprocess.run(command, cwd=directory, env=variables, check=False).returncode == 0


def build(programs: Iterable[str]) -> bool:
    """The test programs, of the dev preset."""
    if not (BUILD / "build.ninja").exists():
        configure = ["cmake", "--preset", "dev", "--log-level=WARNING"]
        if subprocess.run(configure, cwd=SOURCE, check=False).returncode != 0:
            return False
    command = ["cmake", "--build", str(BUILD), "-j", JOBS, "--target", *sorted(set(programs))]
    log = SOURCE / "build" / "log"
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        print(log.read_text()[-3000:], flush=True)
    return done.returncode == 0


def run(catcher: Catcher) -> Outcome:
    """Runs it until the first test that fails."""
    command = [
        str(BUILD / catcher.program),
        f"--gtest_filter={catcher.filter}",
        "--gtest_fail_fast",
    ]
    try:
        done = subprocess.run(
            command,
            cwd=BUILD,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        output = (expired.output or b"").decode(errors="replace")
        started = re.findall(r"^\[ RUN      \] (\S+)", output, re.M)
        return Outcome(False, f"{started[-1] if started else catcher.program} (hangs)")
    output = done.stdout.decode(errors="replace")
    if done.returncode == 0:
        ran = re.search(r"^\[  PASSED  \] ([1-9]\d*) test", output, re.M)
        return Outcome(ran is not None, "" if ran else f"{catcher.program}: no test ran")
    failed = re.search(r"^\[  FAILED  \] ([^\s,]+)", output, re.M)
    if failed:
        return Outcome(False, failed[1])
    started = re.findall(r"^\[ RUN      \] (\S+)", output, re.M)
    return Outcome(False, f"{started[-1] if started else catcher.program} (ends the program)")


def end_what_is_left() -> None:
    """Kill daemons and workers that a test which hung or crashed has left, stopped ones too."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "exe").readlink().is_relative_to(SOURCE):
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            pass  # It has ended, or is none of ours.


def check_all(mutants: list[Mutant]) -> int:
    """Whether each patch fits the sources as they are."""
    unfit = [m.name for m in mutants if not apply(m, "--check", directory=ROOT)]
    for name in unfit:
        print(f"{name}: does not apply to these sources any more")
    print(f"{len(mutants) - len(unfit)} of {len(mutants)} mutants can be planted")
    return 1 if unfit or not mutants else 0


def try_one(mutant: Mutant) -> Outcome:
    """How its catchers ended: not passed is what is wanted.

    Raises:
        RuntimeError: it could not be planted.
    """
    if not apply(mutant, directory=SOURCE):
        raise RuntimeError("does not apply")
    try:
        if not build(catcher.program for catcher in mutant.catchers):
            raise RuntimeError("does not build")
        for catcher in mutant.catchers:
            outcome = run(catcher)
            if not outcome.passed:
                break
        return outcome
    finally:
        end_what_is_left()
        apply(mutant, "--reverse", directory=SOURCE)


def score(mutants: list[Mutant]) -> int:
    """Tries each; prints the table of docs/RELIABILITY.md."""
    copy_sources()
    catchers = {catcher for mutant in mutants for catcher in mutant.catchers}
    print("building, and running the tests without a planted bug", flush=True)
    if not build(catcher.program for catcher in catchers):
        return 1
    for catcher in sorted(catchers, key=lambda one: (one.program, one.filter)):
        outcome = run(catcher)
        if not outcome.passed:
            print(f"fails without a planted bug: {outcome.what}")
            return 1
    uncaught = []
    print("| planted bug | what is wrong | caught by |\n| --- | --- | --- |", flush=True)
    for mutant in mutants:
        started = time.monotonic()
        try:
            outcome = try_one(mutant)
            verdict = "**nothing**" if outcome.passed else f"`{outcome.what}`"
        except RuntimeError as error:
            verdict = f"**{error}**"
        if verdict.startswith("**"):
            uncaught.append(mutant.name)
        print(f"| {mutant.name} | {mutant.bug} | {verdict} |", flush=True)
        print(f"{mutant.name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    print(f"{len(mutants) - len(uncaught)} of {len(mutants)} caught")
    for name in uncaught:
        print(f"NOT CAUGHT {name}")
    return 1 if uncaught else 0


def main() -> int:
    """Exit status: 0 all caught (or plantable), 1 not, 2 the words cannot be understood."""
    parser = argparse.ArgumentParser(prog="scripts/mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="those whose names begin so")
    parser.add_argument("--check", action="store_true", help="only whether each can be planted")
    arguments = parser.parse_args()
    mutants = [read_mutant(patch) for patch in sorted(MUTANTS.glob("*.patch"))]
    if arguments.names:
        mutants = [m for m in mutants if m.name.startswith(tuple(arguments.names))]
    if not mutants:
        parser.error("no mutant has such a name")
    return check_all(mutants) if arguments.check else score(mutants)


if __name__ == "__main__":
    sys.exit(main())
