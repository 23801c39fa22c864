"""Bad input and bad days: a clear error, and nothing lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stillframe.torch as stillframe
import training
from daemon import daemon_pid, kill_daemon, slow_daemon

RESUME = """
import sys
import stillframe.torch as stillframe
from torch import nn

checkpointer = stillframe.Checkpointer(sys.argv[1], model=nn.Linear(1, 1))
try:
    checkpointer.resume()
except stillframe.InvalidArgument as error:
    print(error)
else:
    sys.exit("it was resumed")
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of the steps 0, 1 and 2; its weights are the step."""
    model = nn.Linear(64, 64)
    with stillframe.Checkpointer(tmp_path / "run", model=model) as checkpointer:
        for step in range(3):
            nn.init.constant_(model.weight, step)
            checkpointer.save(step).wait(timeout=30)
    return tmp_path / "run"


def damage(run: Path, step: int, file: str = "model.safetensors") -> None:
    """Flip a byte in the middle of the file."""
    (path,) = run.glob(f"*-step-{step}/{file}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_loudly(
    run: Path, file: str
) -> None:
    damage(run, 2, file)
    model = nn.Linear(64, 64)
    with stillframe.Checkpointer(run, model=model) as checkpointer:
        with pytest.warns(stillframe.StillframeWarning, match="restoring step 1 instead"):
            restored = checkpointer.resume()
    assert restored is not None
    assert restored.step == 1
    assert torch.all(model.weight == 1)


def test_on_damage_raise_raises(run: Path) -> None:
    damage(run, 2)
    with stillframe.Checkpointer(run, model=nn.Linear(64, 64)) as checkpointer:
        with pytest.raises(stillframe.DataLoss, match=r"model\.safetensors extent 0"):
            checkpointer.resume(on_damage="raise")


def test_when_none_restores_it_is_data_loss_and_not_a_fresh_start(run: Path) -> None:
    for step in range(3):
        damage(run, step)
    with stillframe.Checkpointer(run, model=nn.Linear(64, 64)) as checkpointer:
        with pytest.raises(stillframe.DataLoss, match="no checkpoint can be restored"):
            checkpointer.resume()


def test_a_damaged_step_that_was_asked_for_is_not_exchanged(run: Path) -> None:
    damage(run, 1)
    with stillframe.Checkpointer(run, model=nn.Linear(64, 64)) as checkpointer:
        with pytest.raises(stillframe.DataLoss):
            checkpointer.resume(1)


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpointer = stillframe.Checkpointer(tmp_path / "file" / "run", model=nn.Linear(1, 1))
    with pytest.raises(stillframe.InvalidArgument, match="run"):
        checkpointer.resume()
    with pytest.raises(stillframe.InvalidArgument, match="run"):
        checkpointer.save(0)


def test_a_directory_that_is_not_writable_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    command = [sys.executable, "-c", RESUME, tmp_path / "run"]
    if os.geteuid() == 0:
        # Without these root may write only where the mode lets it; the daemon inherits that.
        command[:0] = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}" in done.stdout
    assert "Permission denied" in done.stdout


def test_a_second_writer_is_refused_until_the_first_has_left(tmp_path: Path) -> None:
    first = stillframe.Checkpointer(tmp_path / "run", model=nn.Linear(1, 1))
    first.save(0)
    second = stillframe.Checkpointer(tmp_path / "run", model=nn.Linear(1, 1))
    with pytest.raises((stillframe.InvalidArgument, stillframe.Unavailable), match="run"):
        second.resume()
    first.close()
    assert second.resume() is not None
    second.close()


@pytest.mark.parametrize(
    ("step", "metrics", "extra", "words"),
    [
        (-1, None, None, "step is -1"),
        (1 << 63, None, None, "step is 9223372036854775808"),
        (1.5, None, None, "step is 1.5, not an integer"),
        (0, {"loss": "low"}, None, "metric loss"),
        (0, {"loss": torch.ones(2)}, None, "metric loss"),
        (0, {3: 1.0}, None, "metric name 3"),
        (0, {"a\nb": 1.0}, None, "metric"),
        (0, None, {"loader": [0, iter(())]}, r"extra\.loader\[1\] is a builtins\.tuple_iterator"),
    ],
    ids=["negative", "large", "float", "text", "vector", "name", "control", "leaf"],
)
def test_a_wrong_call_raises_at_the_call(
    tmp_path: Path, step: Any, metrics: Any, extra: Any, words: str
) -> None:
    with stillframe.Checkpointer(tmp_path / "run", model=nn.Linear(1, 1)) as checkpointer:
        with pytest.raises(stillframe.InvalidArgument, match=words):
            checkpointer.save(step, metrics=metrics, extra=extra)
        checkpointer.save(1, metrics={"loss": 1}, extra={}).wait(timeout=30)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"best": ("loss", "least", 1)}, "mode"),
        ({"keep_last": 0}, "keep_last"),
        ({"best": "loss"}, "best is"),
        ({"world_size": 2}, "one rank"),
        ({"model": {"../g": nn.Linear(1, 1)}}, "model name"),
        ({"model": {"a/b": nn.Linear(1, 1)}}, "model name"),
        ({"model": {"a\0b": nn.Linear(1, 1)}}, "model name"),
        ({"model": "net"}, "model="),
        ({"optimizer": nn.Linear(1, 1)}, "optimizer="),
        ({"scheduler": 3}, "scheduler="),
    ],
    ids=lambda value: str(value)[:20],
)
def test_wrong_arguments_are_refused_at_once(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(stillframe.InvalidArgument, match=words):
        stillframe.Checkpointer(tmp_path / "run", **{"model": nn.Linear(1, 1), **options})
    assert not (tmp_path / "run").exists()


def test_a_run_name_with_nul_is_refused() -> None:
    with pytest.raises(stillframe.InvalidArgument, match="NUL"):
        stillframe.Checkpointer("a\0b", model=nn.Linear(1, 1))


def test_no_daemon_binary_is_unavailable_and_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLFRAME_DAEMON", str(tmp_path / "nowhere"))
    checkpointer = stillframe.Checkpointer(tmp_path / "run", model=nn.Linear(1, 1))
    with pytest.raises(stillframe.Unavailable, match="nowhere"):
        checkpointer.resume()


@pytest.mark.filterwarnings("ignore::stillframe.StillframeWarning")
def test_a_daemon_killed_at_any_time_fails_the_save_and_the_next_one_works(tmp_path: Path) -> None:
    run = training.make()
    with run.checkpointer(tmp_path / "run", check="full") as checkpointer:
        checkpointer.resume()
        for step in range(4):
            run.step()
            checkpointer.save(step).wait(timeout=30)
        lost = []
        for step in range(4, 8):
            run.step()
            ticket = checkpointer.save(step)
            kill_daemon()
            run.step()
            lost.append(ticket)
        run.step()
        digest = run.digest()
        checkpointer.save(8).wait(timeout=30)
        assert run.digest() == digest
    assert all(ticket.state in ("failed", "durable") for ticket in lost)
    assert any(ticket.state == "failed" for ticket in lost)


def test_on_error_raise_raises_the_failure_once_at_the_next_save(tmp_path: Path) -> None:
    model = nn.Linear(4096, 4096)  # So much that the daemon is still at it when it is killed.
    with stillframe.Checkpointer(tmp_path / "run", model=model, on_error="raise") as checkpointer:
        checkpointer.save(0).wait(timeout=30)
        with slow_daemon():
            checkpointer.save(1)
            kill_daemon()
        with (
            pytest.warns(stillframe.StillframeWarning, match="step 1 has failed"),
            pytest.raises(stillframe.Unavailable),
        ):
            checkpointer.save(2)
        checkpointer.save(3).wait(timeout=30)


@pytest.mark.filterwarnings("ignore::stillframe.StillframeWarning")
def test_a_training_that_ends_does_not_wait_for_ever_for_a_daemon_that_is_stopped(
    tmp_path: Path,
) -> None:
    checkpointer = stillframe.Checkpointer(tmp_path / "run", model=nn.Linear(64, 64))
    checkpointer.save(0).wait(timeout=30)
    pid = daemon_pid()
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        ticket = checkpointer.save(1)
        with pytest.raises(stillframe.Unavailable, match="does not answer"):
            checkpointer.close()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert ticket.state == "failed"


def test_two_checkpointers_in_one_process_do_not_meet(tmp_path: Path) -> None:
    runs = [training.make(seed) for seed in (1, 2)]
    pair = [run.checkpointer(tmp_path / f"run{i}", check="full") for i, run in enumerate(runs)]
    for step in range(4):
        for run, checkpointer in zip(runs, pair, strict=True):
            run.step()
            checkpointer.save(step, extra=id(run))
    digests = [run.model[0].weight.detach().clone() for run in runs]
    for run, checkpointer, digest in zip(runs, pair, digests, strict=True):
        run.step()
        restored = checkpointer.resume()
        assert restored is not None
        assert restored.extra == id(run)
        assert torch.equal(run.model[0].weight, digest)
        checkpointer.close()


def test_a_busy_daemon_makes_skip_skip_and_wait_raise(tmp_path: Path) -> None:
    model = nn.Linear(1024, 1024)
    with stillframe.Checkpointer(
        tmp_path / "run", model=model, when_busy="skip", capture="eager"
    ) as checkpointer:
        checkpointer.save(0).wait(timeout=30)
        tickets = []
        with pytest.warns(stillframe.StillframeWarning) as caught, slow_daemon():
            while not any(ticket.state == "skipped" for ticket in tickets):
                tickets.append(checkpointer.save(1))
        assert "skipped" in str(caught[0].message)
        skipped = tickets[-1]
        with pytest.raises(stillframe.ResourceExhausted):
            skipped.wait()
        assert checkpointer.status["skipped"] == 1


def test_ctrl_c_and_other_threads_run_while_a_ticket_is_waited_for(tmp_path: Path) -> None:
    ticks = []
    with stillframe.Checkpointer(tmp_path / "run", model=nn.Linear(512, 512)) as checkpointer:
        ticket = checkpointer.save(0)
        thread = threading.Thread(target=lambda: ticks.append(ticket.wait(timeout=30)))
        thread.start()
        ticket.wait(timeout=30)
        thread.join(30)
    assert ticks == [None]
