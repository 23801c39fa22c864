"""Runs the libFuzzer targets, as many at a time as there are processors, and prints a table.

Called by scripts/fuzz, in the repository root, once the preset "fuzz" is built.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "fuzz"
FINDINGS = BUILD / "findings"
CORPUS = ROOT / "tests" / "fuzz" / "corpus"  # The committed one, which is read and never written.
DICTIONARIES = ROOT / "tests" / "fuzz" / "dictionaries"

# Of one input. The largest that is worth trying is a header of some thousand tensors.
INPUT_BYTES_MAX = 65_536
INPUT_SECONDS_MAX = 5
MEMORY_MIB_MAX = 2_048


@dataclass(frozen=True)
class Result:
    """What one target did.

    Attributes:
        features: what libFuzzer counts as different behaviour.
        finding: the last words of a run that broke a promise; empty if none did.
    """

    target: str
    executions: int
    features: int
    finding: str


def targets() -> list[str]:
    """Names of the targets that were built."""
    return sorted(path.name.removeprefix("fuzz_") for path in BUILD.glob("fuzz_*"))


def fuzz(target: str, seconds: int) -> Result:
    """Runs one target for `seconds`."""
    found = BUILD / "corpus" / target
    found.mkdir(parents=True, exist_ok=True)
    FINDINGS.mkdir(exist_ok=True)
    command = [
        str(BUILD / f"fuzz_{target}"),
        str(found),
        str(CORPUS / target),
        f"-max_total_time={seconds}",
        f"-max_len={INPUT_BYTES_MAX}",
        f"-timeout={INPUT_SECONDS_MAX}",
        f"-rss_limit_mb={MEMORY_MIB_MAX}",
        f"-artifact_prefix={FINDINGS / target}-",
        "-print_final_stats=1",
    ]
    dictionary = DICTIONARIES / f"{target}.dict"
    if dictionary.exists():
        command.append(f"-dict={dictionary}")
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    executions = re.search(r"^stat::number_of_executed_units: (\d+)", done.stderr, re.M)
    features = re.findall(r"\bft: (\d+)", done.stderr)
    return Result(
        target,
        int(executions[1]) if executions else 0,
        int(features[-1]) if features else 0,
        "" if done.returncode == 0 else done.stderr[-3_000:],
    )


def main() -> int:
    """Exit status: 0 no finding, 1 a finding or nothing ran, 2 the words cannot be understood."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=int, default=10, help="for each target (default: 10)")
    length.add_argument("--minutes", type=int, help="for each target")
    parser.add_argument("--list", action="store_true", help="print the targets' names")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="default: all")
    arguments = parser.parse_args()
    known = targets()
    if arguments.list:
        print("\n".join(known))
        return 0
    chosen = arguments.targets or known
    unknown = sorted(set(chosen) - set(known))
    if unknown or not chosen:
        parser.error(f"no target {', '.join(unknown)}; there are: {', '.join(known) or 'none'}")
    seconds = arguments.seconds if arguments.minutes is None else 60 * arguments.minutes
    with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        results = list(pool.map(lambda target: fuzz(target, seconds), chosen))
    print(
        "| target | executions | a second | features | findings |\n| --- | --- | --- | --- | --- |"
    )
    for result in results:
        rate = result.executions // max(seconds, 1)
        verdict = "**one**" if result.finding else "0"
        print(f"| {result.target} | {result.executions} | {rate} | {result.features} | {verdict} |")
    print(f"{sum(result.executions for result in results)} executions in all")
    for result in results:
        if result.finding:
            print(f"\n--- {result.target}\n{result.finding}")
    return 1 if any(result.finding or not result.executions for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
