"""When a save is lazy, and that a torn one never counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stillframe.torch as stillframe
import training
from stillframe._core import fence
from stillframe._core.session import Session

BIG = 2048  # A layer of 16 MiB: its capture takes a while.


class Wide(nn.Module):
    """One large layer and a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(BIG, BIG)
        self.norm = nn.BatchNorm1d(BIG)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.layer(batch))
        return result


def stepped(model: nn.Module, **options: Any) -> torch.optim.Adam:
    optimizer = torch.optim.Adam(model.parameters(), **options)
    step(model, optimizer)
    return optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_auto_is_lazy_only_behind_a_hook_that_ran(tmp_path: Path) -> None:
    run = training.make()
    with run.checkpointer(tmp_path / "run") as checkpointer:
        assert checkpointer.save(0).capture.startswith("eager: the hook of step() has not run")
        run.step()
        assert checkpointer.save(1).capture.startswith("lazy")
        assert checkpointer.save(2).capture.startswith("eager: the hook of step() has not run")
    with stillframe.Checkpointer(tmp_path / "other", model=run.model) as checkpointer:
        assert checkpointer.save(0).capture.startswith("eager: no optimizer")


def test_a_copy_of_the_optimizer_has_no_hook_so_its_saves_are_eager(tmp_path: Path) -> None:
    import copy

    run = training.make()
    with run.checkpointer(tmp_path / "run") as checkpointer:
        run.step()
        checkpointer.save(0)
        run.optimizer = copy.deepcopy(run.optimizer)
        run.step()
        assert checkpointer.save(1).capture.startswith("eager")


def test_a_step_that_is_recorded_into_a_cuda_graph_is_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Simulates what torch says on a GPU, where a wait would become part of the graph.
    is_recording = False
    monkeypatch.setattr(fence, "is_recording", lambda: is_recording)
    run = training.make()
    with run.checkpointer(tmp_path / "run") as checkpointer:
        run.step()
        ticket = checkpointer.save(0)
        assert ticket.capture.startswith("lazy")
        ticket.wait()  # Here the step writes, whatever is recorded.
        is_recording = True
        run.step()
        with pytest.raises(stillframe.InvalidArgument, match="before a replay"):
            checkpointer.fence()
        is_recording = False
        assert checkpointer.save(1).capture.startswith("eager: the hook of step() has not run")


@pytest.mark.parametrize(
    ("capture", "word"), [("eager", "eager: as asked"), ("lazy", "lazy: as asked")]
)
def test_a_forced_capture_says_so(tmp_path: Path, capture: Any, word: str) -> None:
    run = training.make()
    with run.checkpointer(tmp_path / "run", capture=capture) as checkpointer:
        assert checkpointer.save(0).capture.startswith(word)


def test_a_lazy_snapshot_becomes_captured_without_another_step(tmp_path: Path) -> None:
    model = Wide()
    optimizer = stepped(model)
    with stillframe.Checkpointer(
        tmp_path / "run", model=model, optimizer=optimizer, capture="lazy"
    ) as checkpointer:
        ticket = checkpointer.save(0)
        deadline = time.monotonic() + 20
        while ticket.state == "accepted":
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert ticket.state in ("captured", "durable")
        assert ticket.times["fence_wait"] == 0


def test_the_optimizers_step_waits_for_the_capture(tmp_path: Path) -> None:
    model = Wide()
    optimizer = stepped(model)
    before = model.layer.weight.detach().clone()
    with stillframe.Checkpointer(
        tmp_path / "run", model=model, optimizer=optimizer, capture="lazy", check="full"
    ) as checkpointer:
        for count in range(3):
            ticket = checkpointer.save(count)
            before = model.layer.weight.detach().clone()
            step(model, optimizer)
            ticket.wait(timeout=30)
        assert ticket.times["to_captured"] > ticket.times["call"]
        checkpointer.resume()
    assert torch.equal(model.layer.weight, before)


def test_buffers_are_of_the_moment_of_save(tmp_path: Path) -> None:
    model = Wide()
    optimizer = stepped(model)
    with stillframe.Checkpointer(
        tmp_path / "run", model=model, optimizer=optimizer, capture="lazy"
    ) as checkpointer:
        mean = model.norm.running_mean.clone()
        checkpointer.save(0)
        model(torch.randn(8, BIG))  # BatchNorm writes its statistics in forward.
        assert not torch.equal(model.norm.running_mean, mean)
        step(model, optimizer)
        checkpointer.resume()
    assert torch.equal(model.norm.running_mean, mean)


class Held:
    """Holds captures back: the moment between the last byte copied and the comparison.

    Simulates a writer that is faster than the publisher. Does not simulate one that is faster
    than a copier.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real = Session.capture_wait
        self.is_held = True
        monkeypatch.setattr(Session, "capture_wait", self._wait_until_let_go())

    def _wait_until_let_go(self) -> Callable[..., bool]:
        held = self

        def wait(session: Session, ticket: int, *, stall_ms: int, help: bool) -> bool:
            reached = held._real(session, ticket, stall_ms=stall_ms, help=help)
            while not help and held.is_held:
                time.sleep(0.001)
            return reached

        return wait


def write_seen(model: Wide) -> None:
    with torch.no_grad():
        model.layer.weight.add_(1)


def write_unseen(model: Wide) -> None:
    model.layer.weight.data.add_(1)


@pytest.mark.parametrize("write", [write_seen, write_unseen], ids=["version counter", "blocks"])
def test_a_torn_capture_fails_and_names_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Wide], None]
) -> None:
    model = Wide()
    optimizer = stepped(model)
    held = Held(monkeypatch)
    with stillframe.Checkpointer(
        tmp_path / "run", model=model, optimizer=optimizer, capture="lazy", check="full"
    ) as checkpointer:
        ticket = checkpointer.save(0)
        assert checkpointer._saver.attach().capture_wait(ticket._number, stall_ms=5000, help=True)
        version = model.layer.weight._version
        write(model)
        assert (model.layer.weight._version != version) == (write is write_seen)
        checkpointer.fence()
        assert ticket.state == "failed"
        with pytest.raises(stillframe.DataLoss, match="layer.weight"):
            ticket.wait()
        held.is_held = False
        with pytest.warns(stillframe.StillframeWarning, match=r"step 0 has failed.*layer\.weight"):
            again = checkpointer.save(1)
        again.wait(timeout=30)
    assert [path.name for path in (tmp_path / "run").glob("0*")] == ["00000002-step-1"]


def test_fused_adam_raises_no_version_but_is_fenced(tmp_path: Path) -> None:
    model = Wide()
    optimizer = stepped(model, fused=True)
    with stillframe.Checkpointer(
        tmp_path / "run", model=model, optimizer=optimizer, capture="lazy", check="full"
    ) as checkpointer:
        version = model.layer.weight._version
        expected = model.layer.weight.detach().clone()
        checkpointer.save(0)
        step(model, optimizer)
        assert model.layer.weight._version == version
        checkpointer.resume()
    assert torch.equal(model.layer.weight, expected)


def test_fused_adam_without_its_hook_is_seen_by_the_compared_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Wide()
    optimizer = stepped(model, fused=True)
    held = Held(monkeypatch)
    checkpointer = stillframe.Checkpointer(
        tmp_path / "run", model=model, optimizer=optimizer, capture="lazy", check="full"
    )
    checkpointer._hooks.remove()
    ticket = checkpointer.save(0)
    assert checkpointer._saver.attach().capture_wait(ticket._number, stall_ms=5000, help=True)
    step(model, optimizer)
    checkpointer.fence()
    held.is_held = False
    assert isinstance(ticket.error, stillframe.DataLoss)
    with pytest.warns(stillframe.StillframeWarning), pytest.raises(stillframe.DataLoss):
        checkpointer.close()


def test_a_capture_that_makes_no_progress_is_given_up_and_training_goes_on(tmp_path: Path) -> None:
    model = Wide()
    optimizer = stepped(model)
    stuck = pytest.MonkeyPatch()
    stuck.setattr(Session, "capture_wait", lambda self, ticket, *, stall_ms, help: time.sleep(0.01))
    with stillframe.Checkpointer(
        tmp_path / "run", model=model, optimizer=optimizer, capture="lazy"
    ) as checkpointer:
        ticket = checkpointer.save(0)
        step(model, optimizer)
        assert ticket.state == "failed"
        assert isinstance(ticket.error, stillframe.Cancelled)
        stuck.undo()
        with pytest.warns(stillframe.StillframeWarning, match="nothing was copied for 50 ms"):
            checkpointer.save(1)


def test_save_inside_inference_mode_works(tmp_path: Path) -> None:
    with torch.inference_mode():
        model = nn.Linear(3, 3)
        weight = model.weight.clone()
        with stillframe.Checkpointer(tmp_path / "run", model=model) as checkpointer:
            checkpointer.save(0).wait(timeout=30)
            model.weight.zero_()
            checkpointer.resume()
            assert torch.equal(model.weight, weight)
