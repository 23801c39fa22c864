"""When step() saves, and what happens when a training ends early."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import stillframe.torch as stillframe
import training
from stillframe._core.session import Session
from stillframe._torch.policy import Policy
from stillframe.errors import ResourceExhausted, Unavailable

TRAINER = Path(__file__).with_name("policy_trainer.py")


def saved_steps(run: Path) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in sorted(run.glob("0*-step-*"))]


def train(run: Path, steps: range, **options: Any) -> list[int]:
    """The steps that step() saved."""
    one = training.make()
    saved = []
    with one.checkpointer(run, keep_last=None, **options) as checkpointer:
        for step in steps:
            one.step()
            ticket = checkpointer.step(step)
            if ticket is not None:
                ticket.wait(timeout=30)
                saved.append(step)
    return saved


def test_every_steps_saves_multiples_and_never_step_0(tmp_path: Path) -> None:
    assert train(tmp_path / "run", range(10), every_steps=3) == [3, 6, 9]
    assert saved_steps(tmp_path / "run") == [3, 6, 9]


def test_a_multiple_that_is_stepped_over_is_not_forgotten(tmp_path: Path) -> None:
    assert train(tmp_path / "run", range(4, 40, 4), every_steps=10) == [12, 20, 32]


def test_the_same_step_again_is_not_due_again() -> None:
    policy = Policy(every_steps=5)
    assert policy.is_due(5, None)
    assert not policy.is_due(5, None)


def test_every_seconds_counts_from_the_save_before(tmp_path: Path) -> None:
    one = training.make()
    begin, last, intervals = time.monotonic(), time.monotonic(), []
    with one.checkpointer(tmp_path / "run", every_seconds=0.2) as checkpointer:
        for step in range(100_000):
            before = time.monotonic()
            ticket = checkpointer.step(step)
            if ticket is not None:
                intervals.append(time.monotonic() - last)
                last = before
                ticket.wait(timeout=30)
            if time.monotonic() - begin > 1:
                break
            time.sleep(0.001)
    assert 2 <= len(intervals) <= 5
    assert min(intervals) >= 0.2


def test_every_epochs_saves_as_epochs_are_completed_also_after_a_resume(tmp_path: Path) -> None:
    def run(first: int, last: int) -> list[int]:
        one = training.make()
        saved = []
        with one.checkpointer(tmp_path / "run", every_epochs=2) as checkpointer:
            checkpointer.resume()
            for step in range(first, last):
                one.step()
                ticket = checkpointer.step(step, epoch=step // 5)
                if ticket is not None:
                    ticket.wait(timeout=30)
                    saved.append(step)
        return saved

    assert run(0, 12) == [10]
    assert run(11, 25) == [20]


class Loader:
    """What is left of a loader: the epoch it is in."""

    def __init__(self) -> None:
        self.epoch = 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]


def test_the_epoch_comes_from_the_loader_where_there_is_one(tmp_path: Path) -> None:
    loader = Loader()
    options: dict[str, Any] = {"model": nn.Linear(1, 1), "loader": loader, "every_epochs": 1}
    with stillframe.Checkpointer(tmp_path / "run", **options) as checkpointer:
        assert checkpointer.step(1) is None
        loader.epoch = 1
        ticket = checkpointer.step(2)
        assert ticket is not None
        ticket.wait(timeout=30)
        restored = checkpointer.resume()
        assert restored is not None
        assert restored.epoch == 1


def test_every_epochs_without_an_epoch_says_what_is_missing(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    with stillframe.Checkpointer(tmp_path / "run", model=model, every_epochs=1) as checkpointer:
        with pytest.raises(stillframe.InvalidArgument, match="epoch is None.*loader"):
            checkpointer.step(1)


@pytest.mark.parametrize(
    "options",
    [
        {"every_steps": 0},
        {"every_steps": 2.5},
        {"every_seconds": -1},
        {"every_seconds": float("nan")},
        {"every_epochs": 0},
        {"overhead_target": 2},
        {"overhead_target": 0.01, "every_steps": 5},
        {"signals": [9]},
        {"signals": [1000]},
    ],
    ids=str,
)
def test_a_wrong_policy_is_refused_at_once(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(stillframe.InvalidArgument, match=next(iter(options))):
        stillframe.Checkpointer(tmp_path / "run", model=nn.Linear(1, 1), **options)


@pytest.mark.parametrize("step", [-1, 1.5, "3"], ids=str)
def test_a_wrong_step_raises_at_the_call(tmp_path: Path, step: Any) -> None:
    model = nn.Linear(1, 1)
    with stillframe.Checkpointer(tmp_path / "run", model=model, every_steps=5) as checkpointer:
        with pytest.raises(stillframe.InvalidArgument, match="step is"):
            checkpointer.step(step)


def test_extra_may_be_a_function_that_is_called_only_for_a_save(tmp_path: Path) -> None:
    calls = []
    one = training.make()
    with one.checkpointer(tmp_path / "run", every_steps=3) as checkpointer:
        for step in range(1, 5):
            one.step()
            checkpointer.step(step, extra=lambda step=step: calls.append(step) or {"at": step})
        restored = checkpointer.resume()
    assert calls == [3]
    assert restored is not None
    assert restored.extra == {"at": 3}


class Busy:
    """No slot is free.

    Simulates a drive that is slower than the saves; the daemon and its slots are real but unasked.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = Session.begin_save
        self.is_busy = True
        self.timeouts: list[int] = []
        busy = self

        def begin(session: Session, request: Any, sources: Any) -> Any:
            busy.timeouts.append(request.busy_timeout_ms)
            if busy.is_busy and request.busy_timeout_ms <= 50:
                raise ResourceExhausted("no slot")
            return real(session, request, sources)

        monkeypatch.setattr(Session, "begin_save", begin)


def test_step_skips_when_busy_but_waits_for_a_new_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = training.make()
    busy = Busy(monkeypatch)
    with one.checkpointer(
        tmp_path / "run", every_steps=1, best=("loss", "min", 1), busy_timeout=7
    ) as checkpointer:
        one.step()
        with pytest.warns(stillframe.StillframeWarning, match="step 1 was skipped"):
            ticket = checkpointer.step(1)
        assert ticket is not None
        assert ticket.state == "skipped"
        ticket = checkpointer.step(2, metrics={"loss": 1.0})
        assert ticket is not None
        ticket.wait(timeout=30)
        skipped = checkpointer.step(3, metrics={"loss": 2.0})
        assert skipped is not None
        assert skipped.state == "skipped"
        busy.is_busy = False
        one.step()
        last = checkpointer.step(4)
        assert last is not None
        last.wait(timeout=30)
    assert busy.timeouts == [50, 7000, 50, 50]
    assert saved_steps(tmp_path / "run") == [2, 4]


def test_the_last_save_before_close_is_never_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = training.make()
    Busy(monkeypatch)
    checkpointer = one.checkpointer(tmp_path / "run", every_steps=2)
    with pytest.warns(stillframe.StillframeWarning, match="step 2 was skipped"):
        for step in range(4):
            one.step()
            checkpointer.step(step, extra={"at": step})
    digest = one.digest()
    checkpointer.close()
    assert saved_steps(tmp_path / "run") == [3]
    other = training.make(seed=9)
    with other.checkpointer(tmp_path / "run") as checkpointer:
        restored = checkpointer.resume()
    assert restored is not None
    assert restored.extra == {"at": 3}
    assert other.digest() == digest


def test_an_explicit_save_waits_and_when_busy_applies_to_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = Busy(monkeypatch)
    busy.is_busy = False
    for when_busy in (None, "wait", "skip"):
        model = nn.Linear(1, 1)
        with stillframe.Checkpointer(
            tmp_path / f"run-{when_busy}", model=model, every_steps=1, when_busy=when_busy
        ) as checkpointer:
            checkpointer.save(1).wait(timeout=30)
            checkpointer.step(2)
    assert busy.timeouts == [60_000, 50, 60_000, 60_000, 50, 50]


class Broken(Exception):
    pass


def test_an_exception_between_steps_saves_the_state_of_the_last_one(tmp_path: Path) -> None:
    one = training.make()
    with pytest.raises(Broken):
        with one.checkpointer(tmp_path / "run", every_steps=100) as checkpointer:
            for step in range(6):
                one.step()
                checkpointer.step(step)
            digest = one.digest()
            raise Broken
    other = training.make(seed=9)
    with other.checkpointer(tmp_path / "run") as checkpointer:
        restored = checkpointer.resume()
    assert restored is not None
    assert restored.step == 5
    assert other.digest() == digest


def test_an_exception_within_a_step_keeps_the_checkpoint_before_and_says_so(
    tmp_path: Path,
) -> None:
    one = training.make()
    with (
        pytest.raises(Broken),
        pytest.warns(stillframe.StillframeWarning, match="Broken has ended.*step behind 5.*stays"),
    ):
        with one.checkpointer(tmp_path / "run", every_steps=4) as checkpointer:
            for step in range(6):
                one.step()
                checkpointer.step(step)
            one.step()
            raise Broken
    assert saved_steps(tmp_path / "run") == [4]


def test_an_exception_right_after_a_save_does_not_save_again(tmp_path: Path) -> None:
    one = training.make()
    with pytest.raises(Broken):
        with one.checkpointer(tmp_path / "run", every_steps=2) as checkpointer:
            for step in range(5):
                one.step()
                ticket = checkpointer.step(step)
                if ticket is not None:
                    ticket.wait(timeout=30)
            raise Broken
    assert saved_steps(tmp_path / "run") == [2, 4]


def test_an_exception_after_a_save_that_failed_at_once_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = training.make()
    with pytest.raises(Broken):
        with one.checkpointer(tmp_path / "run", every_steps=2) as checkpointer:
            one.step()
            with monkeypatch.context() as broken:

                def refuse(*arguments: Any) -> Any:
                    raise Unavailable("the daemon is away")

                broken.setattr(Session, "begin_save", refuse)
                with pytest.warns(stillframe.StillframeWarning, match="step 2 has failed"):
                    checkpointer.step(2)
            raise Broken
    assert saved_steps(tmp_path / "run") == [2]


def test_an_exception_where_nothing_says_when_training_writes_saves_nothing(
    tmp_path: Path,
) -> None:
    with (
        pytest.raises(Broken),
        pytest.warns(stillframe.StillframeWarning, match="is not known"),
    ):
        with stillframe.Checkpointer(
            tmp_path / "run", model=nn.Linear(1, 1), every_steps=100
        ) as checkpointer:
            checkpointer.step(1)
            raise Broken
    assert saved_steps(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("number", "mode"), [(signal.SIGTERM, "chain"), (signal.SIGUSR1, "signals")]
)
def test_a_signal_saves_at_the_next_step_and_exits_with_143(
    tmp_path: Path, number: signal.Signals, mode: str
) -> None:
    command = [sys.executable, str(TRAINER), str(tmp_path / "run"), mode]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        for line in trainer.stdout:
            if line == "step 5\n":
                trainer.send_signal(number)
                break
        rest = trainer.stdout.read().splitlines()
        assert trainer.wait(30) == 143
    # The handler that was there before is called too.
    assert ("chained 15" in rest) == (mode == "chain")
    steps = [5, *(int(line.split()[1]) for line in rest if line.startswith("step"))]
    assert saved_steps(tmp_path / "run") == [steps[-1] + 1]
    straight = training.make()
    for _ in range(steps[-1] + 2):
        straight.step()
    resumed = training.make(seed=9)
    with resumed.checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.resume()
    assert resumed.digest() == straight.digest()


def test_a_signal_that_no_step_answers_ends_the_process_when_it_closes(tmp_path: Path) -> None:
    command = [sys.executable, str(TRAINER), str(tmp_path / "run"), "unanswered"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        for line in trainer.stdout:
            if line == "waiting\n":
                trainer.send_signal(signal.SIGTERM)
                break
        assert trainer.stdout.read() == ""
        assert trainer.wait(30) == -signal.SIGTERM
    assert saved_steps(tmp_path / "run") == [3]


def test_handlers_are_set_by_the_first_step_only_where_asked_and_go_at_close(
    tmp_path: Path,
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    model = nn.Linear(1, 1)
    with stillframe.Checkpointer(tmp_path / "a", model=model, every_steps=5) as checkpointer:
        assert signal.getsignal(signal.SIGTERM) == before
        checkpointer.step(1)
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    for options in ({"every_steps": 5, "signals": ()}, {}):
        with stillframe.Checkpointer(tmp_path / "a", model=model, **options) as checkpointer:
            checkpointer.step(1)
            assert signal.getsignal(signal.SIGTERM) == before


def test_beside_the_main_thread_no_handler_is_set(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stillframe.Checkpointer(
        tmp_path / "run", model=nn.Linear(1, 1), every_steps=5
    ) as checkpointer:
        thread = threading.Thread(target=checkpointer.step, args=(1,))
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGTERM) == before


def _sleep(is_there: Any) -> None:
    is_there.set()
    time.sleep(60)


def test_a_forked_child_still_ends_by_the_signal(tmp_path: Path) -> None:
    with stillframe.Checkpointer(
        tmp_path / "run", model=nn.Linear(1, 1), every_steps=5
    ) as checkpointer:
        checkpointer.step(1)
        fork = multiprocessing.get_context("fork")
        is_there = fork.Event()
        child = fork.Process(target=_sleep, args=(is_there,))
        child.start()
        # Python itself forgets signals that come before its own work after the fork is done.
        assert is_there.wait(20)
        child.terminate()
        child.join(20)
        assert child.exitcode == -signal.SIGTERM


def test_two_checkpointers_both_see_the_signal_in_any_order_of_closing(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    pair = [
        stillframe.Checkpointer(tmp_path / name, model=nn.Linear(1, 1), every_steps=50)
        for name in ("a", "b")
    ]
    for checkpointer in pair:
        checkpointer.step(1)
    signal.raise_signal(signal.SIGUSR1)
    for step, checkpointer in enumerate(pair, start=2):
        with pytest.raises(SystemExit) as caught:
            checkpointer.step(step)
        assert caught.value.code == 143
    for checkpointer in pair:
        checkpointer.close()
    assert signal.getsignal(signal.SIGUSR1) == before
    assert saved_steps(tmp_path / "a") + saved_steps(tmp_path / "b") == [2, 3]


def test_overhead_target_chooses_from_what_saves_cost_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="stillframe")
    model = nn.Linear(8, 8)
    saved = []
    with stillframe.Checkpointer(
        tmp_path / "run", model=model, overhead_target=0.2
    ) as checkpointer:
        deadline = time.monotonic() + 60
        chosen: str | None = ""
        step = 0
        while "saving every" not in (chosen or ""):
            time.sleep(0.002)
            step += 1
            if checkpointer.step(step) is not None:
                saved.append(step)
            chosen = checkpointer.report().interval
            assert time.monotonic() < deadline
    assert saved[0] > 10
    assert any("overhead_target=0.2: a save costs" in line for line in caplog.messages)


@pytest.mark.parametrize(("cost", "expected"), [(0.05, 50), (0.5, 500)])
def test_the_interval_is_the_cost_over_the_target(cost: float, expected: int) -> None:
    from stillframe._torch.overhead import OverheadTarget

    overhead = OverheadTarget(0.01)
    for _ in range(20):
        overhead.stepped(0.1, is_saving=False)
    overhead.saved(call_seconds=cost / 2)
    overhead.stepped(0.1 + cost / 4, is_saving=True)
    overhead.stepped(0.1 + cost / 4, is_saving=True)
    overhead.ended(known_seconds=cost / 2)
    assert overhead.interval_steps is not None
    assert expected <= overhead.interval_steps <= expected + 1


def test_after_a_resume_the_next_multiple_is_due(tmp_path: Path) -> None:
    one = training.make()
    with one.checkpointer(tmp_path / "run", every_steps=4) as checkpointer:
        for step in range(6):
            one.step()
            checkpointer.step(step)
        restored = checkpointer.resume()
        assert restored is not None
        assert restored.step == 4
        due = [checkpointer.step(step) is not None for step in range(5, 10)]
    assert due == [False, False, False, True, False]
    assert saved_steps(tmp_path / "run") == [4, 8]
