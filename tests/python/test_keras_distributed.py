"""Keras on several devices: saved once, restored on all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_mirrored_fit_goes_on_to_the_same_bits_on_every_replica(tmp_path: Path) -> None:
    script = Path(__file__).with_name("keras_mirrored.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
