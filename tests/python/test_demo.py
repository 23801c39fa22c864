"""The demos of scripts/ that other tests do not run already."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


# Half a minute where nothing else runs.
@pytest.mark.timeout(600)
def test_the_keras_demo_ends_with_equal_bits() -> None:
    done = subprocess.run(
        [sys.executable, str(_SCRIPTS / "demo_keras.py"), "--seed", "5", "--epochs", "3"],
        capture_output=True,
        text=True,
        check=False,
        timeout=590,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    assert "equal, bit for bit" in done.stdout
