"""Fails when a folder includes what it may not.

    layering_test.py ROOT          check the C++ under ROOT
    layering_test.py --self-test   check this script on a made-up tree

The two tables below are the rule, docs/ARCHITECTURE.md the reasons; change them in the commit that
changes the rule. CMake's stillframe_layer(... USES ...) says the same for linking.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# A folder may include itself and the folders in its row. A row names only rows above it, so the
# arrows point one way.
MAY_INCLUDE: dict[str, set[str]] = {
    "base": set(),
    "shm": {"base"},
    "format": {"base"},
    "uring": {"base"},
    "catalog": {"base", "format", "uring"},
    "cuda": {"base"},
    "kernels": {"base", "cuda"},
    "client": {"base", "shm", "format", "uring", "catalog", "cuda", "kernels"},
    "daemon": {"base", "shm", "format", "uring", "catalog", "cuda", "kernels"},
    "cli": {"base", "shm", "format", "uring", "catalog", "cuda", "kernels", "client"},
}

# These may include anything, and nobody may include them.
UNRESTRICTED = {"tests", "bench"}

# A header whose name starts with the key belongs to these folders alone. The longest key wins.
ONLY_IN: dict[str, set[str]] = {
    "liburing": {"uring"},
    "linux/io_uring.h": {"uring"},
    "cuda.h": {"cuda", "kernels"},
    "cuda_runtime": {"kernels"},  # Device code only; the host side speaks the driver API.
    "nccl": {"cuda", "daemon/replicate"},
    "boost/": {"daemon", "cli"},
    "boost/json": {"format", "daemon", "cli"},
    "spdlog/": {"daemon", "cli"},
    "fmt/": {"daemon", "cli"},  # spdlog brings it; below the daemon, text is put together by base.
    "flatbuffers/": {"shm"},
}

CXX_SUFFIXES = {".h", ".hh", ".hpp", ".inc", ".cc", ".cpp", ".cxx", ".cu", ".cuh"}
SKIPPED_FOLDERS = {"build", "out", "third_party", "venv"}
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:"([^"\n]+)"|<([^>\n]+)>)', re.MULTILINE)


def cxx_files(root: Path) -> list[Path]:
    """Every C++ and CUDA file under `root`, sorted, without hidden and build folders."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name for name in subfolders if name[0] != "." and name not in SKIPPED_FOLDERS
        ]
        found += [Path(folder, name) for name in names if Path(name).suffix in CXX_SUFFIXES]
    return sorted(found)


def table_errors() -> Iterator[str]:
    """What is wrong with the table itself: a row that names no folder, itself or one below it."""
    above: set[str] = set()
    for folder, allowed in MAY_INCLUDE.items():
        for other in sorted(allowed - above):
            yield f"MAY_INCLUDE: {folder} names {other}, which is not a row above it"
        above.add(folder)


def objection(root: Path, where: str, header: str, quoted: bool) -> str | None:
    """Why the file at `where`, relative to `root`, may not include `header`; None when it may."""
    folder = where.partition("/")[0]
    prefix = max((key for key in ONLY_IN if header.startswith(key)), key=len, default=None)
    if prefix is not None:
        owners = ONLY_IN[prefix]
        if any(where.startswith(owner + "/") for owner in owners):
            return None
        return f"{header} belongs to {', '.join(sorted(owners))}"
    target = header.partition("/")[0]
    if not quoted:
        if (root / header).is_file():
            return f"write our own header in quotes: {header}"
        return None
    if "/" not in header or target not in MAY_INCLUDE.keys() | UNRESTRICTED:
        return f"write the include from the root: {header}"
    if target != folder and target not in MAY_INCLUDE[folder]:
        return f"{folder} may not include {header}"
    return None


def violations(root: Path, files: list[Path]) -> Iterator[str]:
    """One line, `path:line: reason`, for each include that breaks a rule."""
    for file in files:
        where = file.relative_to(root).as_posix()
        folder = where.partition("/")[0]
        if folder in UNRESTRICTED:
            continue
        if folder not in MAY_INCLUDE:
            yield f"{where}:1: no row in MAY_INCLUDE for this place"
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        for match in INCLUDE.finditer(text):
            ours, theirs = match.groups()
            reason = objection(root, where, ours or theirs, quoted=ours is not None)
            if reason is not None:
                line = text.count("\n", 0, match.start()) + 1
                yield f"{where}:{line}: {reason}"


# Path, content, and the reason expected for each bad line, by line number.
SELF_TEST: list[tuple[str, str, dict[int, str]]] = [
    ("base/error.h", "#include <string>\n", {}),
    (
        "base/bytes.h",
        '#include "shm/ring.h"\n#include <fmt/format.h>\n',
        {1: "base may not include shm/ring.h", 2: "fmt/format.h belongs to cli, daemon"},
    ),
    ("shm/ring.h", '#include "base/error.h"\n#include "flatbuffers/flatbuffers.h"\n', {}),
    (
        "shm/channel.cc",
        '#include "channel.h"\n#include "../base/error.h"\n#include <base/error.h>\n',
        {
            1: "write the include from the root: channel.h",
            2: "write the include from the root: ../base/error.h",
            3: "write our own header in quotes: base/error.h",
        },
    ),
    (
        "format/manifest.cc",
        (
            '#include "format/manifest.h"\n#include "uring/ring.h"\n#include <boost/json.hpp>\n'
            "#include <boost/asio.hpp>\n"
        ),
        {
            2: "format may not include uring/ring.h",
            4: "boost/asio.hpp belongs to cli, daemon",
        },
    ),
    (
        "catalog/run.cc",
        '#include "format/manifest.h"\n#include "uring/io_backend.h"\n#include "shm/ring.h"\n',
        {3: "catalog may not include shm/ring.h"},
    ),
    ("uring/ring.cc", "#include <liburing.h>\n#include <sys/uio.h>\n", {}),
    ("cuda/nccl.h", "#include <nccl.h>\n#include <cuda.h>\n", {}),
    ("kernels/pack.cu", '#include "cuda/event.h"\n#include <cuda.h>\n', {}),
    (
        "shm/ring_misuse.cc",
        '#include "base/result.h"\n#  include <cuda.h>\n#include "uring/ring.h"\n',
        {2: "cuda.h belongs to cuda, kernels", 3: "shm may not include uring/ring.h"},
    ),
    (
        "client/client.cc",
        (
            '#include "shm/ring.h"\n#include "daemon/save.h"\n#include <boost/asio.hpp>\n'
            "// #include <spdlog/spdlog.h>\n"
        ),
        {
            2: "client may not include daemon/save.h",
            3: "boost/asio.hpp belongs to cli, daemon",
        },
    ),
    (
        "daemon/save.cc",
        (
            '#include <boost/asio.hpp>\n#include "uring/ring.h"\n#include "client/client.h"\n'
            "#include <nccl.h>\n#include <liburing.h>\n#include <flatbuffers/verifier.h>\n"
        ),
        {
            3: "daemon may not include client/client.h",
            4: "nccl.h belongs to cuda, daemon/replicate",
            5: "liburing.h belongs to uring",
            6: "flatbuffers/verifier.h belongs to shm",
        },
    ),
    ("daemon/replicate/peer.cc", "#include <nccl.h>\n#include <spdlog/spdlog.h>\n", {}),
    (
        "cli/main.cc",
        '#include "client/client.h"\n#include "tests/testing/tensors.h"\n',
        {2: "cli may not include tests/testing/tensors.h"},
    ),
    ("tests/save_test.cc", '#include "daemon/save.h"\n#include <cuda.h>\n', {}),
    ("bench/stall.cc", "#include <liburing.h>\n", {}),
    ("tools/odd.cc", "", {1: "no row in MAY_INCLUDE for this place"}),
    ("build/generated.h", '#include "anything.h"\n', {}),
]


def self_test() -> list[str]:
    """What this script gets wrong on a made-up tree: empty when it is right."""
    expected = sorted(
        f"{path}:{line}: {reason}"
        for path, _, reasons in SELF_TEST
        for line, reason in reasons.items()
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for path, content, _ in SELF_TEST:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(content, encoding="utf-8")
        found = sorted(violations(root, cxx_files(root)))
    missed = [f"not flagged: {line}" for line in expected if line not in found]
    extra = [f"flagged for no reason: {line}" for line in found if line not in expected]
    return missed + extra


def main() -> int:
    """Exit status: 0 clean, 1 something found, 2 nothing could be checked."""
    parser = argparse.ArgumentParser(description="Checks which folder includes which.")
    parser.add_argument("root", nargs="?", type=Path, help="the repository root")
    parser.add_argument("--self-test", action="store_true", help="check this script instead")
    arguments = parser.parse_args()

    if arguments.self_test:
        found = [*table_errors(), *self_test()]
        checked = f"self-test of {len(SELF_TEST)} files"
    elif arguments.root is None or not arguments.root.is_dir():
        parser.error("ROOT must be a folder")
    else:
        files = cxx_files(arguments.root)
        if not files:
            parser.error(f"no C++ under {arguments.root}: nothing was checked")
        found = [*table_errors(), *violations(arguments.root, files)]
        checked = f"{len(files)} files"

    print("\n".join([*found, f"layering: {checked}, {len(found)} found"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
