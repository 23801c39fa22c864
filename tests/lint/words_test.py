"""Fails when a text for people calls a checkpoint saved before it is durable (DUR-20).

    words_test.py ROOT         check the texts under ROOT
    words_test.py --self-test  check this script on made-up lines

Only DURABLE survives a power cut, so only it may be called "saved". Looked at are the string
literals of the C++ and the Python that a user meets; a line may say "durable" beside it, which
then is the explanation.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("base", "shm", "format", "uring", "catalog", "client", "daemon", "cli", "python")
SUFFIXES = {".cc", ".h", ".py"}
TEXT = re.compile(r'"((?:[^"\\\n]|\\.)*)"')
WORD = re.compile(r"\bsaved\b", re.IGNORECASE)


def findings(where: str, text: str) -> Iterator[str]:
    """One line, `path:line: text`, for each literal that says it without "durable" in its line."""
    for number, line in enumerate(text.splitlines(), start=1):
        code = line.lstrip()
        if code.startswith(("//", "#", "/*", "*", '"""')) or "durable" in line.lower():
            continue
        for match in TEXT.finditer(line):
            if WORD.search(match.group(1)):
                yield f'{where}:{number}: "saved" is for durable alone: {match.group(0)}'


def files(root: Path) -> Iterator[Path]:
    """Every source of FOLDERS, sorted."""
    for folder in FOLDERS:
        for place, subfolders, names in os.walk(root / folder):
            subfolders.sort()
            yield from (
                Path(place, name) for name in sorted(names) if Path(name).suffix in SUFFIXES
            )


SELF_TEST = [
    ('log.info("saved step {}", step);', 1),
    ('return "Saved";', 1),
    ('log.info("saved, durable: {}", step);', 0),
    ("// what is saved here", 0),
    ('# "saved" in a comment', 0),
    ("int saved = 0;", 0),
    ('"""Reads back what was saved."""', 0),
    ('"unsaved and saved_count"', 0),
    (r'"a \" saved"', 1),
]


def self_test() -> list[str]:
    """What this script gets wrong: empty when it is right."""
    return [
        f"{line}: expected {expected}"
        for line, expected in SELF_TEST
        if len(list(findings("x", line))) != expected
    ]


def main() -> int:
    """Exit status: 0 clean, 1 something found, 2 nothing could be checked."""
    parser = argparse.ArgumentParser(description="Checks that only durable is called saved.")
    parser.add_argument("root", nargs="?", type=Path, help="the repository root")
    parser.add_argument("--self-test", action="store_true", help="check this script instead")
    arguments = parser.parse_args()

    if arguments.self_test:
        found = self_test()
        checked = f"self-test of {len(SELF_TEST)} lines"
    elif arguments.root is None:
        parser.error("ROOT is needed")
    else:
        paths = list(files(arguments.root))
        if not paths:
            parser.error(f"no sources under {arguments.root}: nothing was checked")
        found = []
        for path in paths:
            text = path.read_text(encoding="utf-8", errors="replace")
            found += findings(path.relative_to(arguments.root).as_posix(), text)
        checked = f"{len(paths)} files"

    print("\n".join([*found, f"words: {checked}, {len(found)} found"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
