"""A checkpoint that does not fit: everything is listed, nothing is changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import stillframe.torch as stillframe


def old_model() -> nn.ModuleDict:
    torch.manual_seed(1)
    return nn.ModuleDict(
        {"encoder": nn.Linear(3, 4), "head": nn.Linear(4, 2), "gone": nn.Linear(1, 1)}
    )


def new_model() -> nn.ModuleDict:
    torch.manual_seed(2)
    return nn.ModuleDict(
        {
            "encoder": nn.Linear(3, 4),
            "head": nn.Linear(4, 3),
            "added": nn.Linear(1, 1),
        }
    )


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run with one checkpoint of old_model()."""
    model = old_model()
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with stillframe.Checkpointer(
        tmp_path / "run", model=model, optimizer=optimizer
    ) as checkpointer:
        checkpointer.save(0)
    yield tmp_path / "run"


def test_all_differences_are_listed_and_nothing_is_written(run: Path) -> None:
    model = new_model()
    model["encoder"].double()
    optimizer = torch.optim.Adam(model.parameters())
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    with stillframe.Checkpointer(run, model=model, optimizer=optimizer) as checkpointer:
        with pytest.raises(stillframe.InvalidArgument) as caught:
            checkpointer.resume()
    message = str(caught.value)
    for words in (
        "missing in the checkpoint: added.weight, added.bias",
        "gone.bias",
        "gone.weight",
        "head.weight is [3, 4], in the checkpoint [2, 4]",
        "head.bias is [3], in the checkpoint [2]",
        "encoder.weight is F64, in the checkpoint F32",
        "optimizer: added.weight",
        "strict=False",
    ):
        assert words in message
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not optimizer.state
    assert torch.equal(random_state, torch.get_rng_state())


def test_strict_false_skips_names_and_shapes_and_their_state(run: Path) -> None:
    model = new_model()
    optimizer = torch.optim.Adam(model.parameters())
    kept = model["head"].weight.detach().clone()
    with stillframe.Checkpointer(run, model=model, optimizer=optimizer) as checkpointer:
        checkpointer.resume(strict=False)
    assert not torch.equal(model["encoder"].weight, new_model()["encoder"].weight)
    assert torch.equal(model["head"].weight, kept)
    assert optimizer.state[model["encoder"].weight]["step"] == 1
    assert model["head"].weight not in optimizer.state
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_strict_false_still_refuses_other_dtypes(run: Path) -> None:
    with stillframe.Checkpointer(run, model=new_model().half()) as checkpointer:
        with pytest.raises(stillframe.InvalidArgument, match="other dtype"):
            checkpointer.resume(strict=False, only=["model"])


def test_only_restores_what_it_names(run: Path) -> None:
    model = old_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with stillframe.Checkpointer(run, model=model) as checkpointer:
        checkpointer.resume(only=["encoder."])
        assert model["encoder"].weight.count_nonzero() > 0
        assert model["head"].weight.count_nonzero() == 0
        checkpointer.resume(only=["model"])
        assert model["head"].weight.count_nonzero() > 0
        with pytest.raises(stillframe.InvalidArgument, match="selects none"):
            checkpointer.resume(only=["nowhere."])


def test_optimizer_state_without_an_optimizer_is_a_difference(run: Path) -> None:
    with stillframe.Checkpointer(run, model=old_model()) as checkpointer:
        with pytest.raises(stillframe.InvalidArgument, match="pass optimizer="):
            checkpointer.resume()


def test_map_names_moves_tensors_and_their_state(run: Path) -> None:
    expected = old_model()
    model = nn.ModuleDict({"body": nn.Linear(3, 4), "head": nn.Linear(4, 2)})
    optimizer = torch.optim.Adam(model.parameters())

    def map_names(name: str) -> str | None:
        if name.startswith("gone."):
            return None
        return name.replace("encoder.", "body.")

    with stillframe.Checkpointer(run, model=model, optimizer=optimizer) as checkpointer:
        with pytest.raises(stillframe.InvalidArgument, match="optimizer: gone.weight"):
            checkpointer.resume(map_names=map_names)
        checkpointer.resume(map_names=map_names, strict=False)
    assert not torch.equal(model["body"].weight, expected["encoder"].weight)  # One step further.
    assert optimizer.state[model["body"].weight]["step"] == 1
    assert len(optimizer.state) == 4
