"""Everything that a Checkpointer takes comes back bit for bit, or nothing is touched."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import full_training
import stillframe.torch as stillframe
from full_training import Full

PROGRAM = Path(full_training.__file__)


@pytest.fixture(autouse=True)
def _group_of_one() -> Iterator[None]:
    full_training.join_alone()
    yield
    torch.distributed.destroy_process_group()


def save_once(directory: Path, step: int = 0, **objects: Any) -> None:
    with stillframe.Checkpointer(directory, **objects) as checkpointer:
        checkpointer.save(step)


def resume(directory: Path, *, how: dict[str, Any] | None = None, **objects: Any) -> Any:
    with stillframe.Checkpointer(directory, **objects) as checkpointer:
        return checkpointer.resume(**(how or {}))


def newest(run: Path) -> Path:
    return max(run.glob("0*"))


def test_a_training_with_everything_goes_on_in_a_new_process(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), str(tmp_path / "run"), "12"]
    killed = subprocess.run([*command, "7"], capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    straight = Full(seed=0)
    for _ in range(12):
        straight.step()
    assert again.stdout.splitlines() == ["resumed 6", f"digest {straight.digest()}"]


@pytest.mark.parametrize("capture", ["eager", "lazy"])
def test_everything_comes_back_without_the_wrappers_and_under_clean_names(
    tmp_path: Path, capture: Any
) -> None:
    first = Full(seed=1)
    with stillframe.Checkpointer(
        tmp_path / "run", **first.members(), capture=capture, check="full"
    ) as checkpointer:
        for step in range(5):
            first.step()
            checkpointer.save(step).wait(timeout=30)
        digest = first.digest()
        for _ in range(3):
            first.step()
    second = Full(seed=2, wraps=False)
    restored = resume(tmp_path / "run", **second.members())
    assert restored.step == 4
    assert second.digest() == digest
    for _ in range(3):
        second.step()
    assert second.digest() == first.digest()
    assert second.net.head.weight is second.net.embedding.weight
    names = set(safetensors.torch.load_file(newest(tmp_path / "run") / "model.safetensors"))
    assert names == {"embedding.weight", "body.weight", "body.bias"}
    averages = set(safetensors.torch.load_file(newest(tmp_path / "run") / "ema.safetensors"))
    assert averages == {f"ema.{name}" for name in names} | {"ema.n_averaged"}


def test_float_moments_of_bfloat_parameters_stay_float(tmp_path: Path) -> None:
    first, second = Full(seed=1, wraps=False), Full(seed=2, wraps=False)
    first.step()
    save_once(tmp_path / "run", model=first.net, optimizer=first.optimizer)
    resume(tmp_path / "run", model=second.net, optimizer=second.optimizer)
    moment = second.optimizer.state[second.net.body.weight]["moment"]
    assert moment.dtype == torch.float32
    assert torch.equal(moment, first.optimizer.state[first.net.body.weight]["moment"])


def test_a_state_that_is_a_parameter_is_not_written_twice(tmp_path: Path) -> None:
    full = Full(seed=1, wraps=False)
    full.step()
    save_once(tmp_path / "run", **full.members())
    state = json.loads((newest(tmp_path / "run") / "state.json").read_text())
    assert state["state"]["meter"]["watched"] == {"$tensor": "body.weight"}
    other = Full(seed=2, wraps=False)
    resume(tmp_path / "run", **other.members())
    assert torch.equal(other.meter.loaded, full.net.body.weight)
    assert other.meter.loaded.data_ptr() != other.net.body.weight.data_ptr()


def generators(seed: int) -> dict[str, Any]:
    return {
        "torch": torch.Generator().manual_seed(seed),
        "pcg": np.random.Generator(np.random.PCG64(seed)),
        "philox": np.random.Generator(np.random.Philox(seed)),
        "sfc": np.random.Generator(np.random.SFC64(seed)),
        "mt": np.random.Generator(np.random.MT19937(seed)),
        "legacy": np.random.RandomState(seed),
        "python": random.Random(seed),
    }


def draw(one: Any) -> list[float]:
    if isinstance(one, torch.Generator):
        return [torch.rand((), generator=one).item() for _ in range(5)]
    if isinstance(one, random.Random):
        return [one.gauss(0, 1) for _ in range(5)]
    return [float(one.normal()) for _ in range(5)]


def test_generators_of_every_kind_go_on_where_they_were(tmp_path: Path) -> None:
    first, second = generators(1), generators(2)
    for one in first.values():
        draw(one)
    model = nn.Linear(1, 1)
    save_once(tmp_path / "run", model=model, generators=first)
    expected = {name: draw(one) for name, one in first.items()}
    resume(tmp_path / "run", model=model, generators=second)
    assert {name: draw(one) for name, one in second.items()} == expected


def test_a_generator_of_another_kind_is_a_difference_and_all_stay_as_they_are(
    tmp_path: Path,
) -> None:
    model = nn.Linear(1, 1)
    save_once(tmp_path / "run", model=model, generators=np.random.default_rng(1))
    other = random.Random(3)
    before = other.getstate()
    with pytest.raises(stillframe.InvalidArgument) as caught:
        resume(tmp_path / "run", model=model, generators=other)
    assert "generators is a random.Random, in the checkpoint a numpy.Generator.PCG64" in str(
        caught.value
    )
    assert other.getstate() == before


@pytest.mark.parametrize("given", [3, random.SystemRandom(), {"a": "b"}], ids=type)
def test_what_is_no_generator_is_refused(tmp_path: Path, given: Any) -> None:
    with pytest.raises(stillframe.InvalidArgument, match="generators"):
        stillframe.Checkpointer(tmp_path / "run", model=nn.Linear(1, 1), generators=given)


def test_a_checkpoint_without_the_members_lists_them_and_strict_false_skips_them(
    tmp_path: Path,
) -> None:
    old = Full(seed=1, wraps=False)
    old.step()
    save_once(tmp_path / "run", model=old.net, optimizer=old.optimizer)
    full = Full(seed=2, wraps=False)
    before = full.digest()
    with pytest.raises(stillframe.InvalidArgument) as caught:
        resume(tmp_path / "run", **full.members())
    message = str(caught.value)
    for word in ("scheduler", "scaler", "ema.body.weight", "loader", "state", "generators"):
        assert word in message
    assert full.digest() == before
    meter = full.meter.total.clone()
    resume(tmp_path / "run", how={"strict": False}, **full.members())
    assert torch.equal(full.net.body.weight, old.net.body.weight)
    assert torch.equal(full.meter.total, meter)


def test_members_that_are_not_given_are_listed_and_only_leaves_them_out(tmp_path: Path) -> None:
    full = Full(seed=1, wraps=False)
    full.step()
    save_once(tmp_path / "run", **full.members())
    other = Full(seed=2, wraps=False)
    with pytest.raises(stillframe.InvalidArgument) as caught:
        resume(tmp_path / "run", model=other.net)
    for word in ("optimizer", "scheduler", "scaler", "ema", "loader", "state", "generators"):
        assert f"{word} (pass {word}=" in str(caught.value)
    random_state = torch.get_rng_state()
    resume(tmp_path / "run", how={"only": "model"}, model=other.net)
    assert torch.equal(other.net.body.weight, full.net.body.weight)
    assert torch.equal(torch.get_rng_state(), random_state)
    with pytest.raises(stillframe.InvalidArgument, match="modle"):
        resume(tmp_path / "run", how={"only": "modle"}, model=other.net)


class Picky:
    """Refuses every state but its own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["name"] != self.name:
            raise ValueError(f"{state['name']} is not {self.name}")


def test_an_object_that_refuses_its_state_leaves_everything_as_it_was(tmp_path: Path) -> None:
    full = Full(seed=1, wraps=False)
    full.step()
    members = full.members()
    members["state"] = {"meter": full.meter, "picky": Picky("old")}
    save_once(tmp_path / "run", **members)
    other = Full(seed=2, wraps=False)
    other.step()
    before = other.digest()
    members = other.members()
    members["state"] = {"meter": other.meter, "picky": Picky("new")}
    with pytest.raises(stillframe.InvalidArgument, match=r"state\.picky refused.*old is not new"):
        resume(tmp_path / "run", **members)
    assert other.digest() == before


def test_an_average_of_another_shape_is_listed_with_both_shapes(tmp_path: Path) -> None:
    model, average = nn.Linear(2, 2), torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    save_once(tmp_path / "run", model=model, ema=average)
    other = torch.optim.swa_utils.AveragedModel(nn.Linear(3, 2))
    with pytest.raises(
        stillframe.InvalidArgument,
        match=r"ema\.weight is \[2, 3\], in the checkpoint \[2, 2\]",
    ):
        resume(tmp_path / "run", model=model, ema=other)


class ShadowList:
    """An EMA in the style of torch_ema: no module, its state has a list of tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = [parameter.detach().clone() for parameter in model.parameters()]

    def state_dict(self) -> dict[str, Any]:
        return {"decay": 0.9, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow = state["shadow"]


def test_several_averages_of_different_make_come_back(tmp_path: Path) -> None:
    def make(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Linear(2, 2)
        averages = {
            "fast": torch.optim.swa_utils.AveragedModel(model),
            "slow": torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2)),
            "list": ShadowList(model),
        }
        return {"model": model, "ema": averages}

    first, second = make(1), make(2)
    save_once(tmp_path / "run", **first)
    resume(tmp_path / "run", **second)
    for name in ("fast", "slow"):
        assert torch.equal(first["ema"][name].module.weight, second["ema"][name].module.weight)
    assert all(map(torch.equal, first["ema"]["list"].shadow, second["ema"]["list"].shadow))


def test_a_dict_of_one_is_not_the_same_as_one(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    save_once(tmp_path / "run", model=model, state=None, loader={"train": Picky("x")})
    with pytest.raises(
        stillframe.InvalidArgument, match="loader= was a dict at the save and is one object now"
    ):
        resume(tmp_path / "run", model=model, loader=Picky("x"))


def test_tensors_on_the_meta_device_are_refused_by_name(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    save_once(tmp_path / "run", model=model)
    with pytest.raises(stillframe.InvalidArgument, match="weight is on the meta device"):
        resume(tmp_path / "run", model=nn.Linear(1, 1, device="meta"))
    picky = ShadowList(nn.Linear(1, 1, device="meta"))
    with stillframe.Checkpointer(
        tmp_path / "run", model=model, state={"shadow": picky}
    ) as checkpointer:
        with pytest.raises(
            stillframe.InvalidArgument, match=r"state\.shadow\.shadow\[0\] is on the meta device"
        ):
            checkpointer.save(1)


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        ({"state": nn.Linear(1, 1)}, "state= is a Linear"),
        ({"state": {"a/b": Picky("x")}}, "state name"),
        ({"state": {"a": 3}}, r"state\['a'\] is a int"),
        ({"loader": [1]}, "loader= is a list"),
        ({"scaler": torch.amp.GradScaler}, "scaler="),
        ({"model": {"ema": nn.Linear(1, 1)}}, "that of a part"),
    ],
    ids=["module", "name", "number", "list", "class", "part"],
)
def test_wrong_members_are_refused_at_once(
    tmp_path: Path, objects: dict[str, Any], words: str
) -> None:
    with pytest.raises(stillframe.InvalidArgument, match=words):
        stillframe.Checkpointer(tmp_path / "run", **{"model": nn.Linear(1, 1), **objects})


class FakeCuda:
    """The generators of two GPUs.

    Simulates: their states, and that asking a process without a context would make one. Does not
    simulate: drawing.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, devices: int) -> None:
        self.states = [torch.full((16,), i, dtype=torch.uint8) for i in range(devices)]
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(self.states))
        monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(self.states))
        monkeypatch.setattr(torch.cuda, "set_rng_state", self._set)

    def _set(self, state: torch.Tensor, device: int) -> None:
        self.states[device] = state


def test_the_generators_of_every_gpu_are_saved_and_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(1, 1)
    cuda = FakeCuda(monkeypatch, devices=2)
    save_once(tmp_path / "run", model=model)
    cuda.states = [torch.zeros(16, dtype=torch.uint8)] * 2
    resume(tmp_path / "run", model=model)
    assert [int(state[0]) for state in cuda.states] == [0, 1]
    cuda.states = cuda.states[:1]
    with pytest.warns(stillframe.StillframeWarning, match="2 CUDA devices, here are 1"):
        resume(tmp_path / "run", model=model)
