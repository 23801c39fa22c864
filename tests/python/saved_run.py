"""A run with one checkpoint and its exports, made once for the tests of a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import training
from command import ok
from conftest import end_process
from daemon import daemon_pid


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, training.Training]:
    """A run with one checkpoint of step 4, and the training as it was then."""
    path = tmp_path_factory.mktemp("saved") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("socket")))
        patch.delenv("STILLFRAME_SOCKET", raising=False)
        made = training.make()
        for _ in range(4):
            made.step()
        with made.checkpointer(path) as checkpointer:
            extra = {"config": {"model_type": "mlp", "sizes": (12, 32)}, "order": torch.arange(5)}
            checkpointer.save(4, metrics={"loss": 0.5}, extra=extra).wait()
        pid = daemon_pid()
        if pid is not None:
            end_process(pid)
    return path, made


@pytest.fixture(scope="module")
def exported(
    saved: tuple[Path, training.Training], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A directory with that checkpoint in each format, by its name: torch/, dcp and so on."""
    path = tmp_path_factory.mktemp("exported")
    for form in ("safetensors", "hf", "torch", "dcp"):
        ok("export", saved[0], path / form, "--to", form)
    return path
