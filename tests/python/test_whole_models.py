"""save_model() and load_model(): the bytes of a model and its directory, without pickle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stillframe.torch as stillframe
from command import run
from stillframe._torch.recipe import checkpoint_recipe
from whole_model import ALLOW, TOKENS, Net, Plain, compute, make_net, quantised, trained

# --- Tensors -------------------------------------------------------------------------------------


def test_dtypes_ties_frozen_weights_and_buffers_come_back(tmp_path: Path) -> None:
    model = trained(Net(8)).bfloat16()
    model.embed.weight.requires_grad_(False)
    model.register_buffer("phases", torch.randn(3, dtype=torch.complex128))
    stillframe.save_model(model, tmp_path / "m", config={"hidden": 8})

    def factory(hidden: int) -> Net:
        made = Net(hidden)
        made.register_buffer("phases", torch.zeros(3, dtype=torch.complex128))
        made.head.weight = nn.Parameter(torch.zeros(16, hidden))  # No longer tied.
        return made

    for mmap in (False, True):
        loaded = stillframe.load_model(tmp_path / "m", factory=factory, mmap=mmap)
        for name, tensor in model.state_dict().items():
            assert loaded.state_dict()[name].dtype == tensor.dtype
            assert torch.equal(loaded.state_dict()[name], tensor)
        assert loaded.head.weight is loaded.embed.weight
        assert not loaded.embed.weight.requires_grad
        assert loaded.table.dtype is torch.bfloat16
        assert loaded.offsets.dtype is torch.float32


def test_dtype_converts_floating_point_tensors_alone(tmp_path: Path) -> None:
    model = trained(Net(8))
    stillframe.save_model(model, tmp_path / "m", config={"hidden": 8})
    loaded = stillframe.load_model(tmp_path / "m", allow=ALLOW, dtype=torch.float64, device="cpu")
    assert loaded.embed.weight.dtype is torch.float64
    assert loaded.norm.num_batches_tracked.dtype is torch.int64
    assert loaded.head.weight is loaded.embed.weight
    with pytest.raises(stillframe.InvalidArgument, match="no floating-point dtype"):
        stillframe.load_model(tmp_path / "m", allow=ALLOW, dtype=torch.int8)


def test_loading_computes_no_first_values_but_makes_what_is_no_parameter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stillframe.save_model(trained(Net(8)), tmp_path / "m", config={"hidden": 8})
    before = torch.get_rng_state()
    loaded = stillframe.load_model(tmp_path / "m", allow=ALLOW)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(loaded.table, Net(8).table)


def test_strides_of_the_model_stay(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    stillframe.save_model(model, tmp_path / "m")

    def factory() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last).half()

    loaded = stillframe.load_model(tmp_path / "m", factory=factory)
    assert loaded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(loaded[0].weight, model[0].weight)


def test_a_model_made_on_the_meta_device_is_filled(tmp_path: Path) -> None:
    model = trained(Net(8))
    stillframe.save_model(model, tmp_path / "m", config={"hidden": 8})

    def factory(hidden: int) -> nn.Module:
        made = Net(hidden)
        made.embed = nn.Embedding(16, hidden, device="meta")
        made.head = nn.Linear(hidden, 16, bias=False, device="meta")
        return made

    loaded = stillframe.load_model(tmp_path / "m", factory=factory)
    assert torch.equal(loaded(TOKENS), compute(model))
    assert loaded.head.weight is loaded.embed.weight


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda m: m.to("meta"), "layer.weight is on the meta device"),
        (
            lambda m: m.register_buffer("q", quantised()),
            "q is quantised",
        ),
        (lambda m: m.register_buffer("s", torch.eye(3).to_sparse()), "s is a sparse"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(tmp_path: Path, spoil: Any, said: str) -> None:
    stillframe.save_model(Plain(), tmp_path / "m")
    kept = (tmp_path / "m" / "manifest.json").read_bytes()
    model = Plain()
    spoil(model)
    with pytest.raises(stillframe.InvalidArgument, match=said):
        stillframe.save_model(model, tmp_path / "m")
    assert (tmp_path / "m" / "manifest.json").read_bytes() == kept


def test_all_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    stillframe.save_model(Net(8), tmp_path / "m", config={"hidden": 8})

    def factory() -> nn.Module:
        made = Net(9)
        made.more = nn.Linear(1, 1)
        del made.norm.bias
        return made

    with pytest.raises(stillframe.InvalidArgument) as raised:
        stillframe.load_model(tmp_path / "m", factory=factory)
    text = str(raised.value)
    assert "missing in the checkpoint: more.bias, more.weight" in text
    assert "only in the checkpoint: norm.bias" in text
    assert "other shape: embed.weight is [16, 9], in the checkpoint [16, 8]" in text
    assert "nothing was loaded" in text


def test_extra_states_come_back(tmp_path: Path) -> None:
    class Counting(Plain):
        count = 0

        def get_extra_state(self) -> Any:
            return {"count": self.count}

        def set_extra_state(self, state: Any) -> None:
            self.count = state["count"]

    model = Counting()
    model.count = 7
    stillframe.save_model(model, tmp_path / "m", config={})
    loaded = stillframe.load_model(tmp_path / "m", factory=Counting)
    assert loaded.count == 7


def test_a_compiled_model_is_saved_as_what_is_inside(tmp_path: Path) -> None:
    model = trained(Net(8))
    stillframe.save_model(torch.compile(model), tmp_path / "m", config={"hidden": 8})
    loaded = stillframe.load_model(tmp_path / "m", allow=ALLOW)
    assert type(loaded) is Net
    assert torch.equal(loaded(TOKENS), compute(model))


# --- The directory -------------------------------------------------------------------------------


def test_a_saved_model_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "m"
    stillframe.save_model(nn.Linear(2, 2), path)
    stillframe.save_model(nn.Linear(3, 3), path)
    assert stillframe.load_model(path).in_features == 3
    assert os.listdir(path.parent) == ["m"]
    other = tmp_path / "other"
    other.mkdir()
    stillframe.save_model(nn.Linear(2, 2), other)
    for name, said in [("file", "no whole model"), ("full", "other files")]:
        target = tmp_path / name
        if name == "file":
            target.write_text("x")
        else:
            target.mkdir()
            (target / "x").write_text("x")
        with pytest.raises(stillframe.InvalidArgument, match=said):
            stillframe.save_model(nn.Linear(2, 2), target)
    with pytest.raises(stillframe.InvalidArgument, match="checkpoint"):
        stillframe.save_model(nn.Linear(2, 2), tmp_path / "00000012-step-1200")


@pytest.mark.parametrize(
    "file", ["model.safetensors", "state.json", "manifest.sums", "manifest.json"]
)
def test_damage_is_found_in_every_file(tmp_path: Path, file: str) -> None:
    stillframe.save_model(nn.Linear(400, 700), tmp_path / "m")
    target = tmp_path / "m" / file
    whole = target.read_bytes()
    for place in (0, len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        target.write_bytes(damaged)
        with pytest.raises(stillframe.DataLoss):
            stillframe.load_model(tmp_path / "m")
        target.write_bytes(whole[:place])
        with pytest.raises(stillframe.DataLoss):
            stillframe.load_model(tmp_path / "m")
    target.write_bytes(whole)
    stillframe.load_model(tmp_path / "m")


def test_mapped_weights_are_left_to_verify(tmp_path: Path) -> None:
    stillframe.save_model(nn.Linear(1000, 700), tmp_path / "m")
    with (tmp_path / "m" / "model.safetensors").open("r+b") as file:
        file.seek(1_500_000)
        file.write(b"\x01\x02\x03")
    stillframe.load_model(tmp_path / "m", mmap=True)
    with pytest.raises(stillframe.DataLoss, match=r"model\.safetensors extent 1"):
        stillframe.verify(tmp_path / "m")


def test_training_a_mapped_model_leaves_the_file_alone(tmp_path: Path) -> None:
    stillframe.save_model(nn.Linear(100, 100), tmp_path / "m")
    model = stillframe.load_model(tmp_path / "m", mmap=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.ones(100)).sum().backward()
    optimizer.step()
    stillframe.verify(tmp_path / "m")


def test_the_command_line_shows_and_verifies_a_saved_model(tmp_path: Path) -> None:
    for name in ("m", "best", "net@2"):
        stillframe.save_model(nn.Linear(2, 2), tmp_path / name)
        for command in ("verify", "show"):
            done = run(command, tmp_path / name)
            assert done.code == 0, done.err
        stillframe.load_model(tmp_path / name)
    (tmp_path / "m" / "model.safetensors").write_bytes(b"x")
    assert run("verify", tmp_path / "m").code == 4


def test_a_saved_model_is_no_run_to_train_in(tmp_path: Path) -> None:
    stillframe.save_model(nn.Linear(2, 2), tmp_path / "m")
    with (
        pytest.raises(stillframe.InvalidArgument, match="neither empty nor a run"),
        stillframe.Checkpointer(tmp_path / "m", model=nn.Linear(2, 2)) as checkpointer,
    ):
        checkpointer.save(0)


# --- Checkpoints of a run ------------------------------------------------------------------------


def test_checkpoints_of_a_run_load_by_every_name(tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = Plain()
    losses = {1: 0.5, 2: 0.1, 3: 0.9}
    with stillframe.Checkpointer(
        run, model=model, best=("loss", "min", 1), keep_last=None
    ) as checkpointer:
        for step, loss in losses.items():
            with torch.no_grad():
                model.layer.weight.fill_(step)
            checkpointer.save(step, {"loss": loss}).wait("durable", timeout=60)
    directories = sorted(path for path in run.iterdir() if "-step-" in path.name)
    for name, step in [
        (run, 3),
        (f"{run}@latest", 3),
        (f"{run}@best", 2),
        (f"{run}/best", 2),
        (f"{run}@step-1", 1),
        (directories[0], 1),
        (f"{directories[1]}/", 2),
    ]:
        for mmap in (False, True):
            loaded = stillframe.load_model(name, factory=Plain, mmap=mmap)
            assert loaded.layer.weight[0, 0] == step, name
    with pytest.raises(stillframe.InvalidArgument, match=r"whole_model:Plain.*allow=.*or factory="):
        stillframe.load_model(run)
    assert stillframe.load_model(run, allow=ALLOW).layer.weight[0, 0] == 3
    for missing in (f"{run}@17", tmp_path / "none", f"{tmp_path}/none@best"):
        with pytest.raises(stillframe.NotFound):
            stillframe.load_model(missing, factory=Plain)


def test_a_run_of_torchs_own_modules_loads_without_a_factory(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    compiled = torch.compile(model)
    with stillframe.Checkpointer(
        tmp_path / "run", model=compiled, best=("loss", "min", 1)
    ) as checkpointer:
        for step, loss in ((1, 0.1), (2, 0.9)):
            model[3].bias.data.fill_(step)
            checkpointer.save(step, {"loss": loss})
    for name, step in (("run", 2), ("run@best", 1)):
        loaded = stillframe.load_model(tmp_path / name)
        assert not loaded.training
        assert loaded[3].bias.item() == step
        assert not loaded[0].weight.requires_grad
        assert loaded[1].running_mean.equal(model[1].running_mean)


def test_a_run_whose_config_is_given_loads_without_a_factory(tmp_path: Path) -> None:
    for name, how in (
        ("class", {"config": {"hidden": 3}}),
        ("factory", {"config": {"hidden": 3}, "factory": "whole_model:make_net"}),
    ):
        model = trained(Net(3) if name == "class" else make_net(3))
        with stillframe.Checkpointer(tmp_path / name, model=model, **how) as checkpointer:
            checkpointer.save(0)
        loaded = stillframe.load_model(tmp_path / name, allow=ALLOW)
        assert compute(loaded).equal(compute(model.eval()))


def test_a_config_that_cannot_be_is_refused_before_the_training(tmp_path: Path) -> None:
    for models, how, message in (
        ({"a": Net(3), "b": Net(3)}, {"config": {}}, "of one model"),
        (Net(3), {"factory": lambda: Net(3)}, "cannot be imported"),
        (Net(3), {"factory": "no name"}, "module:name"),
        (Net(3), {"config": {"hidden": object()}}, "config.hidden"),
    ):
        with pytest.raises(stillframe.InvalidArgument, match=message):
            stillframe.Checkpointer(tmp_path / "run", model=models, **how)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_gets_a_recipe_only_where_the_model_says_how_it_is_made() -> None:
    assert checkpoint_recipe(Net(3)) is None
    with_config = checkpoint_recipe(torch.compile(Net(3)), config={"hidden": 3})
    assert with_config is not None
    assert with_config["class"] == "whole_model:Net"
    described = checkpoint_recipe(nn.Sequential(nn.Linear(2, 2).requires_grad_(False)))
    assert described is not None
    assert "structure" in described
    assert described["frozen"] == ["0.weight", "0.bias"]
