"""The console script `stillframe`: becomes the binary that the package carries."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> None:
    """Replace this process by the command-line tool, with the same arguments."""
    program = Path(__file__).with_name("bin") / "stillframe"
    try:
        os.execv(program, [str(program), *sys.argv[1:]])
    except OSError as error:
        sys.exit(f"stillframe: cannot run {program}: {error.strerror}")
