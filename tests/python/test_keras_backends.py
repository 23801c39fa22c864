"""Callbacks and whole models on Keras's other backends: the tests of those, once more on each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_FOLDER = Path(__file__).parent


@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_callbacks_and_models_work_there_too(backend: str) -> None:
    pytest.importorskip("keras", reason="keras is not installed")
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    files = [_FOLDER / "test_keras_checkpoint.py", _FOLDER / "test_keras_models.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)],
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
