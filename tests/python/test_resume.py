"""What was saved comes back, bit for bit, into the objects that are there."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import stillframe.torch as stillframe
import training
from daemon import kill_daemon

TRAINER = Path(__file__).with_name("trainer_process.py")


def save_once(directory: Path, **objects: Any) -> None:
    """One durable checkpoint, at step 0."""
    with stillframe.Checkpointer(directory, **objects) as checkpointer:
        checkpointer.save(0)


def test_a_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    straight = training.make()
    for _ in range(10):
        straight.step()

    first = training.make()
    with first.checkpointer(tmp_path / "run", check="full") as checkpointer:
        assert checkpointer.resume() is None
        for step in range(5):
            first.step()
            checkpointer.save(step, extra={"order": [3, 1, 2], "epoch": 1})
    second = training.make(seed=7)
    with second.checkpointer(tmp_path / "run") as checkpointer:
        restored = checkpointer.resume()
        assert restored is not None
        assert restored.step == 4
        assert restored.extra == {"order": [3, 1, 2], "epoch": 1}
    for _ in range(5):
        second.step()
    assert second.digest() == straight.digest()
    assert second.losses == straight.losses[5:]


@pytest.mark.parametrize("steps_before_kill", [2, 5])
def test_a_training_killed_by_sigkill_ends_like_one_that_was_not(
    tmp_path: Path, steps_before_kill: int
) -> None:
    command = [sys.executable, str(TRAINER), str(tmp_path / "run"), "10"]
    with subprocess.Popen([*command, "0.05"], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        for line in trainer.stdout:
            if line == f"step {steps_before_kill}\n":
                trainer.kill()
                break
    again = subprocess.run([*command, "0"], capture_output=True, text=True, check=True)
    straight = training.make()
    for _ in range(10):
        straight.step()
    assert f"digest {straight.digest()}" in again.stdout
    (resumed,) = [line for line in again.stdout.splitlines() if line.startswith("resumed")]
    assert 0 < int(resumed.split()[1]) <= steps_before_kill + 1


def test_after_a_kill_the_snapshot_comes_from_the_daemons_memory(tmp_path: Path) -> None:
    command = [sys.executable, str(TRAINER), str(tmp_path / "run"), "1000", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        for line in trainer.stdout:
            if line == "step 3\n":
                trainer.kill()
                break
    run = training.make()
    with run.checkpointer(tmp_path / "run") as checkpointer:
        restored = checkpointer.resume()
    assert restored is not None
    assert restored.source == "memory"


def test_without_a_daemon_left_the_disk_gives_the_same(tmp_path: Path) -> None:
    run = training.make()
    with run.checkpointer(tmp_path / "run") as checkpointer:
        run.step()
        checkpointer.save(3)
    kill_daemon()
    other = training.make(seed=3)
    with other.checkpointer(tmp_path / "run") as checkpointer:
        restored = checkpointer.resume()
    assert restored is not None
    assert restored.source == "disk"
    assert other.digest() == run.digest()


@pytest.mark.parametrize("collects", [True, False])
def test_a_resume_leaves_the_garbage_collector_as_it_was(tmp_path: Path, collects: bool) -> None:
    save_once(tmp_path / "run", model=nn.Linear(3, 2))
    was_enabled = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        with stillframe.Checkpointer(tmp_path / "run", model=nn.Linear(3, 2)) as checkpointer:
            checkpointer.resume()
            assert gc.isenabled() == collects
        with (
            stillframe.Checkpointer(tmp_path / "run", model=nn.Linear(5, 2)) as checkpointer,
            pytest.raises(stillframe.InvalidArgument),
        ):
            checkpointer.resume()
        assert gc.isenabled() == collects
    finally:
        (gc.enable if was_enabled else gc.disable)()


def test_a_first_resume_touches_nothing(tmp_path: Path) -> None:
    run = training.make()
    before = run.digest()
    with run.checkpointer(tmp_path / "run") as checkpointer:
        assert checkpointer.resume() is None
        assert checkpointer.resume("best") is None
        assert checkpointer.resume(3) is None
    assert run.digest() == before


def test_a_model_part_opens_with_the_safetensors_library(tmp_path: Path) -> None:
    run = training.make()
    save_once(tmp_path / "run", model=run.model)
    (checkpoint,) = (tmp_path / "run").glob("*-step-0")
    loaded = safetensors.torch.load_file(checkpoint / "model.safetensors")
    expected = run.model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


class Odd(nn.Module):
    """Tensors of unusual form."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
        self.transposed = nn.Parameter(torch.randn(3, 7).t())
        self.register_buffer("count", torch.tensor(5))
        self.register_buffer("empty", torch.empty(0, 4))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("brain", torch.randn(5).to(torch.bfloat16))
        self.register_buffer("small", torch.randn(4).to(torch.float8_e4m3fn))
        self.register_buffer("every_other", torch.arange(10)[::2])
        self.register_buffer("phase", torch.randn(3, dtype=torch.complex64))


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("capture", ["eager", "lazy"])
def test_tensors_of_any_form_come_back_in_their_own_strides(tmp_path: Path, capture: Any) -> None:
    model, other = Odd(), Odd()
    optimizer = torch.optim.Adam(model.parameters())
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    save_once(tmp_path / "run", model=model, optimizer=optimizer, capture=capture, check="full")
    strides = {name: tensor.stride() for name, tensor in other.state_dict().items()}
    addresses = {name: tensor.data_ptr() for name, tensor in other.state_dict().items()}
    other_optimizer = torch.optim.Adam(other.parameters())
    with stillframe.Checkpointer(
        tmp_path / "run", model=other, optimizer=other_optimizer
    ) as checkpointer:
        checkpointer.resume()
    for name, tensor in other.state_dict().items():
        assert raw(tensor) == raw(model.state_dict()[name]), name
        assert tensor.stride() == strides[name]
        assert tensor.data_ptr() == addresses[name]
    moment = other_optimizer.state[other.weight]["exp_avg"]
    assert torch.equal(moment, optimizer.state[model.weight]["exp_avg"])
    assert moment.stride() == other.weight.stride()


def tied() -> nn.ModuleDict:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    return model


def test_tied_weights_come_back_tied(tmp_path: Path) -> None:
    model, other = tied(), tied()
    save_once(tmp_path / "run", model=model)
    with stillframe.Checkpointer(tmp_path / "run", model=other) as checkpointer:
        checkpointer.resume()
    assert other["a"].weight is other["b"].weight
    assert torch.equal(other["b"].weight, model["a"].weight)


def test_tied_weights_fill_both_of_a_model_that_does_not_tie_them(tmp_path: Path) -> None:
    model = tied()
    save_once(tmp_path / "run", model=model)
    other = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    with stillframe.Checkpointer(tmp_path / "run", model=other) as checkpointer:
        checkpointer.resume()
    assert torch.equal(other["a"].weight, model["a"].weight)
    assert torch.equal(other["b"].weight, model["a"].weight)


def test_a_run_under_torch_compile_restores_without_it(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    save_once(tmp_path / "run", model=torch.compile(model))
    other = nn.Linear(3, 3)
    with stillframe.Checkpointer(tmp_path / "run", model=other) as checkpointer:
        checkpointer.resume()
    assert torch.equal(other.weight, model.weight)


def test_the_checkpointer_may_be_made_before_the_model_changes(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with stillframe.Checkpointer(tmp_path / "run", model=model) as checkpointer:
        model.append(nn.Linear(3, 1))
        checkpointer.save(0).wait(timeout=30)
        model.append(nn.Linear(1, 1))
        checkpointer.save(1).wait(timeout=30)
    newest = max((tmp_path / "run").glob("*-step-1"))
    assert "2.bias" in safetensors.torch.load_file(newest / "model.safetensors")


def test_tensors_in_extra_and_scheduler_come_back_in_a_part(tmp_path: Path) -> None:
    run = training.make()
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(run.optimizer)
    plateau.step(torch.tensor(2.5))
    extra = {
        "order": torch.arange(5),
        "nested": [{"x y": torch.ones(2, 2)}],
        "t": (1, torch.tensor(3)),
    }
    objects = {"model": run.model, "optimizer": run.optimizer}
    with stillframe.Checkpointer(tmp_path / "run", scheduler=plateau, **objects) as checkpointer:
        checkpointer.save(0, extra=extra)
    other = torch.optim.lr_scheduler.ReduceLROnPlateau(run.optimizer)
    with stillframe.Checkpointer(tmp_path / "run", scheduler=other, **objects) as checkpointer:
        restored = checkpointer.resume()
    assert restored is not None
    assert torch.equal(restored.extra["order"], extra["order"])
    assert torch.equal(restored.extra["nested"][0]["x y"], torch.ones(2, 2))
    assert restored.extra["t"] == (1, torch.tensor(3))
    assert other.best == plateau.best
    (part,) = (tmp_path / "run").glob("0*/extra.safetensors")
    names = safetensors.torch.load_file(part).keys()
    assert all(name.startswith("extra.") for name in names)
    assert 'extra.nested[0]["x y"]' in names


def test_several_models_and_optimizers_come_back_by_name(tmp_path: Path) -> None:
    def gan(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        models = {"g": nn.Linear(2, 3), "d": nn.Linear(3, 1)}
        optimizers = {
            k: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for k, m in models.items()
        }
        for name, model in models.items():
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizers[name].step()
        schedulers = {k: torch.optim.lr_scheduler.StepLR(o, 1) for k, o in optimizers.items()}
        return {"model": models, "optimizer": optimizers, "scheduler": schedulers}

    first, second = gan(1), gan(2)
    save_once(tmp_path / "run", **first)
    with stillframe.Checkpointer(tmp_path / "run", **second) as checkpointer:
        checkpointer.resume()
    for name in ("g", "d"):
        one, other = first["model"][name].weight, second["model"][name].weight
        assert torch.equal(one, other)
        assert torch.equal(
            first["optimizer"][name].state[one]["momentum_buffer"],
            second["optimizer"][name].state[other]["momentum_buffer"],
        )


def test_a_state_that_the_checkpoint_lacks_is_taken_away(tmp_path: Path) -> None:
    run = training.make()
    save_once(tmp_path / "run", model=run.model, optimizer=run.optimizer)
    run.step()
    with stillframe.Checkpointer(
        tmp_path / "run", model=run.model, optimizer=run.optimizer
    ) as checkpointer:
        checkpointer.resume()
    assert not run.optimizer.state


def test_training_after_a_resume_does_not_write_into_what_was_restored(tmp_path: Path) -> None:
    run = training.make()
    with run.checkpointer(tmp_path / "run", check="full") as checkpointer:
        run.step()
        checkpointer.save(0)
        checkpointer.resume()
        run.step()
        checkpointer.resume()
        digest = run.digest()
        run.step()
        checkpointer.resume()
    assert run.digest() == digest


def test_hyper_parameters_come_back_group_by_group_and_by_name(tmp_path: Path) -> None:
    def two_groups(model: nn.Module, lrs: tuple[float, float], swap: bool) -> torch.optim.SGD:
        groups = [
            {"params": [model.weight], "lr": lrs[0], "weight_decay": 0.5},
            {"params": [model.bias], "lr": lrs[1]},
        ]
        return torch.optim.SGD(groups[::-1] if swap else groups, lr=9.0)

    model = nn.Linear(2, 2)
    save_once(tmp_path / "run", model=model, optimizer=two_groups(model, (0.1, 0.2), swap=False))
    optimizer = two_groups(model, (7.0, 8.0), swap=True)
    with stillframe.Checkpointer(
        tmp_path / "run", model=model, optimizer=optimizer
    ) as checkpointer:
        checkpointer.resume()
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0.5]


class Counting(nn.Module):
    """A module with state of its own beside tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def get_extra_state(self) -> Any:
        return {"calls": self.calls, "seen": torch.full((2,), float(self.calls))}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]
        assert torch.equal(state["seen"], torch.full((2,), float(self.calls)))


def test_the_extra_state_of_modules_comes_back(tmp_path: Path) -> None:
    model, other = nn.Sequential(Counting()), nn.Sequential(Counting())
    model[0].calls = 7
    save_once(tmp_path / "run", model=model)
    with stillframe.Checkpointer(tmp_path / "run", model=other) as checkpointer:
        checkpointer.resume()
    assert other[0].calls == 7


def test_best_is_by_metric_and_nan_never_is(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    options: dict[str, Any] = {"model": model, "keep_last": 2, "best": ("loss", "min", 1)}
    losses = [float("nan"), 0.5, 0.25, float("nan"), np.float32(0.75), torch.tensor(math.inf)]
    with stillframe.Checkpointer(tmp_path / "run", **options) as checkpointer:
        for step, loss in enumerate(losses):
            checkpointer.save(step, metrics={"loss": loss}).wait(timeout=30)
        best = checkpointer.resume("best")
        latest = checkpointer.resume()
    assert best is not None
    assert latest is not None
    assert (best.step, best.metrics) == (2, {"loss": 0.25})
    assert (latest.step, latest.metrics) == (5, {"loss": math.inf})


def test_a_step_may_repeat_and_the_newest_of_it_is_taken(tmp_path: Path) -> None:
    with stillframe.Checkpointer(tmp_path / "run", model=nn.Linear(1, 1)) as checkpointer:
        for extra in ("first", "second"):
            checkpointer.save(5, extra=extra).wait(timeout=30)
        restored = checkpointer.resume(5)
        assert restored is not None
        assert restored.extra == "second"
        with pytest.raises(stillframe.NotFound):
            checkpointer.resume(6)
        with pytest.raises(stillframe.NotFound):
            checkpointer.resume("paper")
