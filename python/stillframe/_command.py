"""The console script `stillframe`: becomes the binary that the package carries."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> None:
    """Replace this process by the command-line tool, with the same arguments."""
    # What it starts for the formats of PyTorch is to be this interpreter.
    os.environ.setdefault("STILLFRAME_PYTHON", sys.executable)
    program = Path(__file__).with_name("bin") / "stillframe"
    try:
        os.execv(program, [str(program), *sys.argv[1:]])
    except OSError as error:
        sys.exit(f"stillframe: cannot run {program}: {error.strerror}")
