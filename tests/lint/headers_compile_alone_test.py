"""Fails when a header needs another one to be included before it.

    headers_compile_alone_test.py ROOT BUILD   check the headers under ROOT, with the flags of BUILD
    headers_compile_alone_test.py --self-test  check this script on a made-up tree

BUILD holds compile_commands.json. A header is compiled with the flags of a source of its own
folder, of any folder where that has none, by -fsyntax-only; several at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SKIPPED_FOLDERS = {"build", "dist"}
# Each with the reason.
EXEMPT = {
    "kernels/unit_loops.h",  # Written against the type Vector that its includer defines first.
}


def headers(root: Path) -> list[Path]:
    """Every header under `root`, sorted, without hidden and build folders."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name for name in subfolders if name[0] != "." and name not in SKIPPED_FOLDERS
        ]
        found += [Path(folder, name) for name in names if name.endswith(".h")]
    return sorted(path for path in found if path.relative_to(root).as_posix() not in EXEMPT)


def flags_by_folder(build: Path) -> dict[str, list[str]]:
    """The compiler and its flags, without input and output, by absolute folder; "" is any."""
    found: dict[str, list[str]] = {}
    for entry in json.loads((build / "compile_commands.json").read_text(encoding="utf-8")):
        words = shlex.split(entry["command"])
        if Path(words[0]).name == "ccache":
            words = words[1:]
        kept = []
        skips_next = False
        for word in words:
            if skips_next or word in ("-c", entry["file"]):
                skips_next = False
            elif word == "-o":
                skips_next = True
            else:
                kept.append(word)
        found.setdefault(str(Path(entry["file"]).parent), kept)
        found.setdefault("", kept)
    return found


def complaint(header: Path, flags: list[str]) -> str | None:
    """What the compiler says of a file that includes `header` alone; None when it is content."""
    command = [*flags, "-fsyntax-only", "-w", "-x", "c++", "-"]
    result = subprocess.run(
        command, input=f'#include "{header}"\n', capture_output=True, text=True, check=False
    )
    return None if result.returncode == 0 else f"{header}: does not compile alone\n{result.stderr}"


def complaints(root: Path, build: Path) -> tuple[int, list[str]]:
    """How many headers were compiled, and what was wrong."""
    flags = flags_by_folder(build)
    found = headers(root)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = pool.map(lambda h: complaint(h, flags.get(str(h.parent), flags[""])), found)
        return len(found), [text for text in said if text is not None]


def self_test() -> list[str]:
    """What this script gets wrong on a made-up tree: empty when it is right."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "good.h").write_text("#include <string>\ninline std::string a;\n", encoding="utf-8")
        (root / "bad.h").write_text("inline std::string b;\n", encoding="utf-8")
        command = f"c++ -std=c++20 -I{root} -o x.o -c {root}/x.cc"
        entry = {"directory": folder, "command": command, "file": f"{root}/x.cc"}
        (root / "compile_commands.json").write_text(json.dumps([entry]), encoding="utf-8")
        count, found = complaints(root, root)
    wrong = [] if count == 2 else [f"compiled {count} headers of 2"]
    if len(found) != 1 or "bad.h" not in found[0]:
        wrong.append(f"flagged: {found}")
    return wrong


def main() -> int:
    """Exit status: 0 clean, 1 something found, 2 nothing could be checked."""
    parser = argparse.ArgumentParser(description="Checks that every header compiles alone.")
    parser.add_argument("root", nargs="?", type=Path, help="the repository root")
    parser.add_argument("build", nargs="?", type=Path, help="a build folder of it")
    parser.add_argument("--self-test", action="store_true", help="check this script instead")
    arguments = parser.parse_args()

    if arguments.self_test:
        found = self_test()
        checked = "self-test of 2 headers"
    elif arguments.root is None or arguments.build is None:
        parser.error("ROOT and BUILD are needed")
    else:
        count, found = complaints(arguments.root.resolve(), arguments.build.resolve())
        if count == 0:
            parser.error(f"no headers under {arguments.root}: nothing was checked")
        checked = f"{count} headers"

    print("\n".join([*found, f"headers compile alone: {checked}, {len(found)} found"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
