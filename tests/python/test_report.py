"""What a training is told about its saves."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import stillframe.torch as stillframe
import training
from stillframe._core import progress
from stillframe._core.session import Session
from stillframe._core.telling import told_bytes, told_seconds
from stillframe.errors import Unavailable


def test_each_durable_save_is_one_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="stillframe")
    one = training.make()
    with one.checkpointer(tmp_path / "run", every_steps=2) as checkpointer:
        for step in range(1, 5):
            one.step()
            ticket = checkpointer.step(step)
            if ticket is not None:
                ticket.wait(timeout=30)
    lines = [line for line in caplog.messages if line.startswith("step=")]
    number = r"[\d.]+(ms|s|min)"
    for step, line in zip((2, 4), lines, strict=True):
        assert re.fullmatch(
            rf"step={step} waited={number} captured={number} durable={number} "
            r"bytes=[\d.]+(B|KiB|MiB) lane=host",
            line,
        ), line


def test_the_line_comes_at_a_later_step_that_saves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="stillframe")
    model = nn.Linear(1, 1)
    with stillframe.Checkpointer(tmp_path / "run", model=model, every_steps=2) as checkpointer:
        ticket = checkpointer.step(2)
        assert ticket is not None
        ticket.wait(timeout=30)
        checkpointer.step(3)
        assert [line for line in caplog.messages if line.startswith("step=2 ")]


def test_the_report_has_figures_a_table_and_counts_what_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = training.make()
    with one.checkpointer(tmp_path / "run") as checkpointer:
        empty = checkpointer.report()
        assert empty.as_dict()["waited"] is None
        assert "0 durable" in str(empty)
        for step in range(3):
            one.step()
            checkpointer.save(step).wait(timeout=30)
        with monkeypatch.context() as broken:

            def refuse(*arguments: Any) -> Any:
                raise Unavailable("the daemon is away")

            broken.setattr(Session, "begin_save", refuse)
            with pytest.warns(stillframe.StillframeWarning, match="step 3 has failed"):
                checkpointer.save(3)
        checkpointer.save(4).wait(timeout=30)
        report = checkpointer.report()
        known = report.as_dict()
    json.dumps(known)
    assert (known["durable"], known["skipped"], known["failed"]) == (4, 0, 1)
    assert [record["step"] for record in known["records"]] == [0, 1, 2, 3, 4]
    assert known["saved_bytes"] == sum(record["bytes"] for record in known["records"])
    assert 0 < known["waited"]["median"] <= known["waited"]["max"] <= known["lost_seconds"]
    assert known["captured"]["median"] > 0
    assert known["durable_lag"]["median"] > 0
    assert known["interval"]["median"] > 0
    assert known["backlog_saves"] == 0
    table = str(report)
    assert "4 durable, 0 skipped, 1 failed" in table
    assert "step 3: the daemon is away" in table
    assert re.search(r"lost step time +[\d.]+ms in all", table)


class Writer:
    """What of a SummaryWriter is needed."""

    def __init__(self) -> None:
        self.scalars: dict[str, tuple[float, int | None]] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        self.scalars[tag] = (scalar_value, global_step)


def test_scalars_go_to_a_summary_writer(tmp_path: Path) -> None:
    writer = Writer()
    one = training.make()
    with one.checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.report().to_tensorboard(writer)
        assert writer.scalars == {"stillframe/backlog_bytes": (0.0, None)}
        one.step()
        checkpointer.save(7).wait(timeout=30)
        checkpointer.report().to_tensorboard(writer)
        report = checkpointer.report()
    assert writer.scalars.keys() == {
        f"stillframe/{name}"
        for name in ("stall_ms", "capture_s", "durable_lag_s", "gbps", "backlog_bytes")
    }
    assert {step for _, step in writer.scalars.values()} == {7}
    record = report.records[-1]
    assert writer.scalars["stillframe/stall_ms"][0] == pytest.approx(1e3 * record.waited)
    report.to_tensorboard(writer, step=9)
    assert writer.scalars["stillframe/gbps"][1] == 9


class Terminal(io.StringIO):
    """A screen that remembers what was written."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_restore_shows_a_bar_only_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    from stillframe._core import restore_read

    monkeypatch.setattr(progress, "_BYTES_MIN", 1)
    monkeypatch.setattr(restore_read, "_PIECE_BYTES", 1000)
    one, other = training.make(), training.make(seed=9)
    with one.checkpointer(tmp_path / "run") as checkpointer:
        one.step()
        checkpointer.save(0)
    screen = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with other.checkpointer(tmp_path / "run") as checkpointer:
        restored = checkpointer.resume()
    assert restored is not None
    assert other.digest() == one.digest()
    assert ("stillframe: restoring" in screen.getvalue()) == is_terminal


def test_without_tqdm_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.byte_bar("restoring", 2**40) as bar:
        assert bar is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0008, "0.8ms"), (0.0384, "38ms"), (1.23, "1.2s"), (300, "5min"), (None, "-")],
)
def test_seconds_are_told_shortly(seconds: float | None, text: str) -> None:
    assert told_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0B"), (1023, "1023B"), (1536, "1.5KiB"), (512 * 2**20, "512MiB")]
)
def test_bytes_are_told_in_binary_units(count: int, text: str) -> None:
    assert told_bytes(count) == text
