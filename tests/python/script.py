"""Tests that are a program of their own, in this folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_script(name: str, directory: Path, **environment: str) -> None:
    """Run it on a directory, with more in its environment; it has to end well."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(name)), str(directory)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
