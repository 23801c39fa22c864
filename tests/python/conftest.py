"""Every test that saves has a private daemon, which ends with the test."""

from __future__ import annotations

import os
import select
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon import daemon_pid

_ROOT = Path(__file__).resolve().parents[2]


def pytest_configure(config: pytest.Config) -> None:
    """Take the newest build where the package was not installed with its binaries.

    One thread: a sum depends on how many add it up, and OpenMP's threads do not survive a fork.
    """
    import torch

    import stillframe

    torch.set_num_threads(1)

    if (Path(stillframe.__file__).parent / "lib").exists() or "STILLFRAME_LIBRARY" in os.environ:
        return
    built = [path.with_name("libstillframe.so") for path in _ROOT.glob("build/*/stillframed")]
    built = sorted(filter(Path.exists, built), key=lambda path: path.stat().st_mtime)
    if built:
        os.environ["STILLFRAME_LIBRARY"] = str(built[-1])


@pytest.fixture(autouse=True)
def _private_daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Not below tmp_path: the name of a socket has 108 bytes at most.
    home = tempfile.mkdtemp(prefix="sf-")
    monkeypatch.setenv("XDG_RUNTIME_DIR", home)
    monkeypatch.delenv("STILLFRAME_SOCKET", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    assert os.environ["XDG_RUNTIME_DIR"] == home  # Else its daemon would be looked for elsewhere.
    pid = daemon_pid()
    if pid is not None:
        end_process(pid)
    shutil.rmtree(home)


def end_process(pid: int) -> None:
    """SIGTERM, then wait for the end; SIGKILL and a failure if it does not come."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with os.fdopen(handle) as gone:
        os.kill(pid, signal.SIGTERM)
        if not select.select([gone], [], [], 20)[0]:
            os.kill(pid, signal.SIGKILL)
            pytest.fail(f"the daemon {pid} did not end after SIGTERM")
