"""What the demos share: a daemon of their own, and tables."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMAND = Path(sys.executable).with_name("stillframe")
MIB = 2**20


@contextmanager
def private_daemon() -> Iterator[None]:
    """A daemon of the demo's own: it is going to be killed."""
    home = tempfile.mkdtemp(prefix="stillframe-demo-")
    os.environ["XDG_RUNTIME_DIR"] = home
    os.environ.pop("STILLFRAME_SOCKET", None)
    try:
        yield
    finally:
        pid = daemon_pid()
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
        shutil.rmtree(home, ignore_errors=True)


def daemon_pid() -> int | None:
    """Ask the daemon that runs now, if one does."""
    status = subprocess.run([COMMAND, "status", "--json"], capture_output=True, check=False)
    return int(json.loads(status.stdout)["pid"]) if status.returncode == 0 else None


def milliseconds(seconds: list[float]) -> str:
    """Median and largest."""
    if not seconds:
        return "-"
    return f"{1e3 * statistics.median(seconds):.1f} / {1e3 * max(seconds):.1f}"


def print_table(rows: list[list[str]]) -> None:
    """The first row is the head; columns aligned."""
    widths = [max(len(line[i]) for line in rows) for i in range(len(rows[0]))]
    for line in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
