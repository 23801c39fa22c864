"""The best checkpoints: which they are, when step() saves one, and that they survive a restart."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import stillframe.torch as stillframe
import training
from stillframe._core.best import BestTracker, parse_best
from stillframe._core.session import Session
from stillframe.errors import Unavailable

TRAINER = Path(__file__).with_name("best_trainer.py")
NAN = math.nan


def saved_steps(run: Path) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in sorted(run.glob("0*-step-*"))]


def retained_steps(run: Path, count: int) -> list[int]:
    """What is left when retention has done its work, which begins once a save is durable."""
    deadline = time.monotonic() + 20
    while len(saved_steps(run)) > count and time.monotonic() < deadline:
        time.sleep(0.01)
    return saved_steps(run)


def steps_saved(run: Path, values: list[Any], **options: Any) -> list[int]:
    """Which of the metrics made step() save."""
    saved = []
    with stillframe.Checkpointer(
        run, model=nn.Linear(1, 1), keep_last=None, **options
    ) as checkpointer:
        for step, value in enumerate(values):
            ticket = checkpointer.step(step, metrics={"loss": value})
            if ticket is not None:
                ticket.wait(timeout=30)
                saved.append(step)
    return saved


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        (("loss", "min", 1), [3, 4, 2, 2.5, 1], [0, 2, 4]),
        (("loss", "max", 1), [3, 4, 2, 5], [0, 1, 3]),
        (("loss", "min", 2), [3, 4, 5, 2, 3.5, 3], [0, 1, 3, 5]),
        (("loss", "min", 1), [NAN, 2, NAN, 3], [1]),
        (("loss", "min", 1), [2, 2, torch.tensor(2.0), np.float64(2)], [0, 1, 2, 3]),
        (("loss", "max", 1), [-math.inf, 0, math.inf, math.inf, 1], [0, 1, 2, 3]),
    ],
    ids=["min", "max", "two", "nan", "ties", "infinite"],
)
def test_step_saves_when_its_metrics_enter_the_best(
    tmp_path: Path, rule: Any, values: list[Any], expected: list[int]
) -> None:
    assert steps_saved(tmp_path / "run", values, best=rule) == expected


def test_any_of_several_criteria_makes_step_save(tmp_path: Path) -> None:
    best = [("loss", "min", 1), ("accuracy", "max", 1)]
    saved = []
    with stillframe.Checkpointer(
        tmp_path / "run", model=nn.Linear(1, 1), best=best, keep_last=None
    ) as checkpointer:
        values = [(1.0, 0.5), (2.0, 0.4), (3.0, 0.6), (0.5, 0.1)]
        for step, (loss, accuracy) in enumerate(values):
            metrics = {"loss": loss, "accuracy": accuracy, "unread": object()}
            del metrics["unread"]
            if checkpointer.step(step, metrics=metrics) is not None:
                saved.append(step)
        least, most = checkpointer.resume("best"), checkpointer.resume("best:accuracy")
        assert least is not None
        assert most is not None
        assert (least.step, most.step) == (3, 2)
        with pytest.raises(stillframe.InvalidArgument, match="no criterion 'f1'; it has loss"):
            checkpointer.resume("best:f1")
    assert saved == [0, 2, 3]


def test_metrics_that_do_not_decide_are_not_read_without_a_save(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    with stillframe.Checkpointer(
        tmp_path / "run", model=model, best=("loss", "min", 1)
    ) as checkpointer:
        checkpointer.step(0, metrics={"loss": 1.0})
        assert checkpointer.step(1, metrics={"loss": 2.0, "other": object()}) is None
        with pytest.raises(stillframe.InvalidArgument, match="metric other is <object"):
            checkpointer.step(2, metrics={"loss": 0.5, "other": object()})


@pytest.mark.parametrize("value", ["0.5", None, object(), torch.ones(2), 1j], ids=type)
def test_a_metric_that_is_not_a_number_is_named(tmp_path: Path, value: Any) -> None:
    model = nn.Linear(1, 1)
    with stillframe.Checkpointer(
        tmp_path / "run", model=model, best=("loss", "min", 1)
    ) as checkpointer:
        with pytest.raises(stillframe.InvalidArgument, match="metric loss is .*, not a number"):
            checkpointer.step(1, metrics={"loss": value})
        with pytest.raises(stillframe.InvalidArgument, match="metric loss is .*, not a number"):
            checkpointer.save(1, metrics={"loss": value})
    assert saved_steps(tmp_path / "run") == []


def test_the_best_survive_a_restart(tmp_path: Path) -> None:
    def train(first: int, *losses: float) -> list[str]:
        command = [sys.executable, str(TRAINER), str(tmp_path / "run"), str(first)]
        done = subprocess.run([*command, *map(str, losses)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    assert train(0, 3, 1, 2) == ["0 True", "1 True", "2 True"]
    # Neither 2.5 nor NaN is among the best two of both processes; 1.5 is.
    assert train(3, 2.5, NAN, 1.5) == ["3 False", "4 False", "5 True"]
    assert retained_steps(tmp_path / "run", 2) == [1, 5]
    model = nn.Linear(1, 1)
    with stillframe.Checkpointer(
        tmp_path / "run", model=model, best=("val_loss", "min", 2)
    ) as checkpointer:
        best = checkpointer.load_best()
    assert best is not None
    assert (best.step, best.metrics) == (1, {"val_loss": 1.0})
    assert model.weight.item() == 1


def test_a_save_that_failed_does_not_hold_the_place_of_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(1, 1)
    with stillframe.Checkpointer(
        tmp_path / "run", model=model, best=("loss", "min", 1)
    ) as checkpointer:
        checkpointer.step(0, metrics={"loss": 3.0})
        with monkeypatch.context() as broken:

            def refuse(*arguments: Any) -> Any:
                raise Unavailable("the daemon is away")

            broken.setattr(Session, "begin_save", refuse)
            with pytest.warns(stillframe.StillframeWarning, match="step 1 has failed"):
                checkpointer.step(1, metrics={"loss": 1.0})
        assert checkpointer.step(2, metrics={"loss": 2.0}) is not None
    assert saved_steps(tmp_path / "run") == [0, 2]


def test_load_best_loads_weights_and_nothing_else(tmp_path: Path) -> None:
    one = training.make()
    with one.checkpointer(tmp_path / "run", best=("loss", "max", 1)) as checkpointer:
        assert checkpointer.load_best() is None
        one.step()
        weight = one.model[0].weight.detach().clone()
        checkpointer.step(1, metrics={"loss": 9.0}, extra={"note": "best"})
        one.step()
        checkpointer.save(2, metrics={"loss": 1.0})
        before = one.optimizer.state[one.model[0].weight]["exp_avg"].clone()
        state = torch.get_rng_state()
        best = checkpointer.load_best("loss")
        assert best is not None
        assert (best.step, best.extra) == (1, {"note": "best"})
    assert torch.equal(one.model[0].weight, weight)
    assert torch.equal(one.optimizer.state[one.model[0].weight]["exp_avg"], before)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_best_of_a_run_is_known_to_a_checkpointer_that_was_given_no_criterion(
    tmp_path: Path,
) -> None:
    model = nn.Linear(1, 1)
    with stillframe.Checkpointer(
        tmp_path / "run", model=model, best=[("loss", "min", 1), ("score", "max", 1)]
    ) as checkpointer:
        for step, loss, score in ((1, 0.1, 5.0), (2, 0.5, 9.0), (3, 0.4, 7.0)):
            model.weight.data.fill_(step)
            checkpointer.save(step, metrics={"loss": loss, "score": score})
    with stillframe.Checkpointer(tmp_path / "run", model=nn.Linear(1, 1)) as checkpointer:
        for best, step in ((None, 1), ("loss", 1), ("score", 2)):
            restored = checkpointer.load_best(best)
            assert restored is not None
            assert restored.step == step
        with pytest.raises(stillframe.InvalidArgument, match="it has loss, score"):
            checkpointer.load_best("f1")
    for selector, step in (("best", 1), ("best:loss", 1), ("best:score", 2)):
        loaded = stillframe.load_model(f"{tmp_path / 'run'}@{selector}")
        assert loaded.weight.item() == step


def test_the_best_without_best_says_what_is_missing(tmp_path: Path) -> None:
    with stillframe.Checkpointer(tmp_path / "run", model=nn.Linear(1, 1)) as checkpointer:
        checkpointer.save(0, metrics={"loss": 1.0}).wait(timeout=30)
        for restore in (checkpointer.load_best, lambda: checkpointer.resume("best")):
            with pytest.raises(stillframe.InvalidArgument, match='best=\\("metric"'):
                restore()


def test_a_run_whose_checkpoints_lack_the_metric_has_no_best(tmp_path: Path) -> None:
    with pytest.warns(stillframe.StillframeWarning, match="best= asks for loss"):
        with stillframe.Checkpointer(
            tmp_path / "run", model=nn.Linear(1, 1), best=("loss", "min", 1)
        ) as checkpointer:
            checkpointer.save(0).wait(timeout=30)
            with pytest.raises(stillframe.NotFound, match="no checkpoint 'best'"):
                checkpointer.load_best()


def test_a_criterion_that_is_never_reported_is_warned_of_once(tmp_path: Path) -> None:
    with pytest.warns(stillframe.StillframeWarning) as caught:
        with stillframe.Checkpointer(
            tmp_path / "run", model=nn.Linear(1, 1), best=("val_los", "min", 1)
        ) as checkpointer:
            for step in range(25):
                checkpointer.save(step, metrics={"val_loss": 1.0, "lr": 0.1})
                assert len(caught) == (step >= 19)
    (message,) = [str(one.message) for one in caught]
    assert "val_los, which none of the 20 saves so far" in message
    assert "they had: lr, val_loss" in message


def test_a_criterion_that_earlier_checkpoints_have_is_not_warned_of(tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": nn.Linear(1, 1), "best": ("loss", "min", 1)}
    with stillframe.Checkpointer(tmp_path / "run", **options) as checkpointer:
        checkpointer.save(0, metrics={"loss": 1.0})
    with stillframe.Checkpointer(tmp_path / "run", **options) as checkpointer:
        checkpointer.save(1)


def test_the_best_by_each_criterion_the_last_and_every_nth_stay_together(tmp_path: Path) -> None:
    losses = [5, 1, 4, 6, 3, 7, 9, 8]
    accuracies = [0.1, 0.2, 0.3, 0.2, 0.9, 0.2, 0.95, 0.1]
    with stillframe.Checkpointer(
        tmp_path / "run",
        model=nn.Linear(1, 1),
        best=[("loss", "min", 1), ("accuracy", "max", 2)],
        keep_every=3,
        keep_last=1,
    ) as checkpointer:
        for step, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True)):
            metrics = {"loss": loss, "accuracy": accuracy}
            checkpointer.save(step, metrics=metrics).wait(timeout=30)
    # 1 has the least loss, 4 and 6 the greatest accuracy, 0, 3 and 6 are multiples, 7 is the last.
    assert retained_steps(tmp_path / "run", 6) == [0, 1, 3, 4, 6, 7]


@pytest.mark.parametrize("keep_every", [0, -1, 2.5, "3"], ids=str)
def test_a_wrong_keep_every_is_refused_at_once(tmp_path: Path, keep_every: Any) -> None:
    with pytest.raises(stillframe.InvalidArgument, match="keep_every"):
        stillframe.Checkpointer(tmp_path / "run", model=nn.Linear(1, 1), keep_every=keep_every)


@pytest.mark.parametrize(
    "best",
    [
        "loss",
        ("loss",),
        ("loss", "least", 1),
        ("loss", "min", 0),
        ("loss", "min", True),
        ("loss", "min", 1, 2),
        (3, "min", 1),
        [("a\nb", "min", 1)],
        [("loss", "min", 1), ("loss", "max", 1)],
        [(f"m{i}", "min", 1) for i in range(17)],
    ],
    ids=lambda best: str(best)[:30],
)
def test_a_wrong_rule_is_refused_at_once(tmp_path: Path, best: Any) -> None:
    with pytest.raises(stillframe.InvalidArgument, match="best|metric name"):
        stillframe.Checkpointer(tmp_path / "run", model=nn.Linear(1, 1), best=best)


def test_damaged_checkpoints_do_not_count_among_the_best() -> None:
    entries = [
        {"metrics": {"loss": 1.0}, "damage": "a flipped bit"},
        {"metrics": {"loss": 5.0}, "damage": None},
    ]
    tracker = BestTracker(parse_best(("loss", "min", 1)), lambda: entries)
    assert tracker.enters({"loss": 4.0})
    assert not tracker.enters({"loss": 6.0})
