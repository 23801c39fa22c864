"""The fence of a save that has tensors on GPUs, without a GPU: what Python does about it.

The tensors are the CPU's, so the library has nothing to hold in a stream; that it does is tested on
the simulated driver, tests/client/gpu_capture_test.cc.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import stillframe.torch as stillframe
import training
from stillframe._core import fence
from stillframe._torch import collect, live


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layout claims to have a tensor on GPU 0, whose stream is its default one."""
    made = live.LiveState.__init__

    def make(self: live.LiveState, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        self.devices = [0]

    monkeypatch.setattr(live.LiveState, "__init__", make)
    monkeypatch.setattr(collect, "current_stream", lambda device: 0)


def weights_of(directory: Path, step: int) -> dict[str, torch.Tensor]:
    (folder,) = directory.glob(f"*-step-{step}")
    return load_file(folder / "model.safetensors")


@pytest.mark.usefixtures("on_gpus")
def test_training_writes_behind_the_open_fence_and_the_save_still_counts(tmp_path: Path) -> None:
    run = training.make()
    run.step()
    with run.checkpointer(tmp_path / "run", check="full", capture="lazy") as checkpointer:
        for step in range(1, 6):
            expected = {name: one.clone() for name, one in run.model.state_dict().items()}
            ticket = checkpointer.save(step)
            run.step()  # Its hook opens the fence; the counters move behind it.
            ticket.wait()
            saved = weights_of(tmp_path / "run", step)
            assert all(torch.equal(saved[name], one) for name, one in expected.items())


@pytest.mark.usefixtures("on_gpus")
def test_a_write_before_the_fence_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def publish_nothing(self: fence.Fence) -> bool:
        time.sleep(0.001)
        return not self._is_stopped

    # Else a small snapshot is complete before anybody can write.
    monkeypatch.setattr(fence.Fence, "_publish_next", publish_nothing)
    run = training.make()
    run.step()
    checkpointer = run.checkpointer(tmp_path / "run", capture="lazy", check="full")
    ticket = checkpointer.save(1)
    with torch.no_grad():
        next(run.model.parameters()).add_(1)
    checkpointer.fence()
    with pytest.raises(stillframe.DataLoss, match="while it was captured"):
        ticket.wait()
    with pytest.warns(match="the save of step 1 has failed"), pytest.raises(stillframe.DataLoss):
        checkpointer.close()


@pytest.mark.usefixtures("on_gpus")
def test_two_saves_without_a_step_between_them_are_both_durable(tmp_path: Path) -> None:
    run = training.make()
    run.step()
    with run.checkpointer(tmp_path / "run", capture="lazy") as checkpointer:
        first = checkpointer.save(1)
        checkpointer.fence()
        second = checkpointer.save(2)
        first.wait()
        second.wait()


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"lane": "fast"}, "lane is 'fast'"),
        ({"gpu_ring_bytes": -1}, "gpu_ring_bytes is -1"),
        ({"gpu_ring_bytes": 1.5}, "gpu_ring_bytes is 1.5"),
    ],
)
def test_a_wish_that_is_none_is_refused_at_once(
    tmp_path: Path, wish: dict[str, Any], message: str
) -> None:
    with pytest.raises(stillframe.InvalidArgument, match=message):
        stillframe.Checkpointer(tmp_path / "run", model=training.make().model, **wish)


@pytest.mark.parametrize("lane", ["pinned", "hbm", "ipc"])
def test_tensors_of_the_cpu_have_one_lane_whatever_is_asked_for(tmp_path: Path, lane: Any) -> None:
    run = training.make()
    with run.checkpointer(tmp_path / "run", lane=lane, gpu_ring_bytes=0) as checkpointer:
        checkpointer.save(0).wait()
        assert checkpointer.status["lane"] == "host"
