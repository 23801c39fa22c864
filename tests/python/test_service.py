"""systemd/: the units, as systemd/install writes them, start a daemon that clients find."""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

import stillframe.torch as stillframe
import training
from daemon import daemon_pid
from stillframe._core import library

_INSTALL = Path(__file__).resolve().parents[2] / "systemd" / "install"
_SYSTEM_SOCKET = "/run/stillframe/stillframed.sock"


def _stillframed() -> Path:
    """The daemon that belongs to the library of these tests."""
    path = library.location()
    beside = path.with_name("stillframed")
    return beside if beside.exists() else path.parent.parent / "bin" / "stillframed"


def _install(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([_INSTALL, *words], capture_output=True, text=True, check=False)


def _unit(kind: str, root: Path) -> Path:
    names = [kind] if kind == "user" else [kind, getpass.getuser()]
    done = _install(*names, "--root", str(root), "--daemon", str(_stillframed()))
    assert done.returncode == 0, done.stderr
    (unit,) = root.rglob("stillframed.service")
    return unit


def _command(unit: Path) -> list[str]:
    (line,) = [one for one in unit.read_text().splitlines() if one.startswith("ExecStart=")]
    return shlex.split(line.removeprefix("ExecStart="))


@pytest.mark.parametrize("kind", ["user", "system"])
def test_an_installed_unit_is_one_that_systemd_accepts(kind: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze")
    unit = _unit(kind, tmp_path)
    verify = ["systemd-analyze", "verify", *(["--user"] if kind == "user" else []), str(unit)]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(unit.name) not in done.stderr, done.stderr


@pytest.mark.parametrize("kind", ["user", "system"])
def test_the_command_of_a_unit_serves_clients_and_makes_all_durable_before_it_ends(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = _command(_unit(kind, tmp_path / "root"))
    if kind == "system":
        # Not where a service of this machine may listen.
        assert command[-1] == _SYSTEM_SOCKET
        command[-1] = f"{os.environ['XDG_RUNTIME_DIR']}/service.sock"
        monkeypatch.setenv("STILLFRAME_SOCKET", command[-1])
    with subprocess.Popen(command) as service:
        while daemon_pid() is None:
            assert service.poll() is None
        made = training.make()
        made.step()
        checkpointer = made.checkpointer(tmp_path / "run")
        ticket = checkpointer.save(1)
        ticket.wait("captured", timeout=60)
        assert daemon_pid() == service.pid
        service.send_signal(signal.SIGTERM)
        assert service.wait(timeout=60) == 0
    stillframe.verify(tmp_path / "run")
    del checkpointer


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["user", "--daemon", "/nowhere/stillframed"], "is not a program"),
        (["user", "--daemon", "bin/sh"], "is not a program"),
        (["system", "no-such-user", "--daemon", "/bin/sh"], "no user no-such-user"),
    ],
)
def test_what_cannot_be_installed_is_named_and_nothing_is_written(
    words: list[str], reason: str, tmp_path: Path
) -> None:
    done = _install(*words, "--root", str(tmp_path))
    assert done.returncode == 1
    assert reason in done.stderr
    assert not list(tmp_path.rglob("*.service"))
