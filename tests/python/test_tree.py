"""A nested dictionary goes out and comes back, equal, with new tensors."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stillframe._core.saved import SavedCheckpoint
from stillframe._core.saver import Saver, SaverOptions
from stillframe._core.session import AttachOptions
from stillframe._lightning.tree import Packed, Places, pack, unpack
from stillframe.errors import DataLoss, InvalidArgument

PLACES = Places("weights", parts={"moments": "optimizer"})


def packed(tree: dict[str, Any], **options: Any) -> Packed:
    arguments: dict[str, Any] = {"is_lazy": lambda tensor: False, "about": {}, **options}
    return pack(tree, PLACES, **arguments)


def save(run: Path, content: Packed, between: Callable[[], None] = lambda: None) -> None:
    saver = Saver(AttachOptions(str(run)), SaverOptions(checks_all=True))
    saver.make_ready()
    saver.begin(content.content, step=1, metrics=(), capture="", lazy=content.lazy)
    between()
    saver.close()


def round_trip(run: Path, tree: dict[str, Any], **options: Any) -> dict[str, Any]:
    save(run, packed(tree, **options))
    with SavedCheckpoint(str(run), "latest") as saved:
        return unpack(saved, allow_pickle=options.get("allow_pickle", False))


def test_tensors_and_plain_values_come_back_equal(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tree = {
        "weights": {"a": base, "a.t": base.t(), "bf": torch.ones(3, dtype=torch.bfloat16)},
        "moments": [{"state": {0: {"exp_avg": base.clone(), "step": torch.tensor(3.0)}}}],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "every other": base[:, ::2],
        "empty": torch.empty(0, 5),
        "flag": torch.tensor(True),
        "plain": {"nan": math.nan, "tuple": (1, "x", None), 3: [b"\0", {1, 2}]},
        "counter": collections.Counter({3: 1}),
    }
    back = round_trip(tmp_path / "run", tree)
    assert list(back) == list(tree)
    assert torch.equal(back["weights"]["a.t"], base.t())
    assert back["weights"]["bf"].dtype == torch.bfloat16
    assert torch.equal(back["moments"][0]["state"][0]["exp_avg"], base)
    assert torch.equal(back["expanded"], tree["expanded"])
    assert torch.equal(back["every other"], base[:, ::2])
    assert back["empty"].shape == (0, 5)
    assert back["flag"].shape == ()
    assert back["flag"].item() is True
    assert math.isnan(back["plain"].pop("nan"))
    assert back["plain"] == {
        "tuple": (1, "x", None),
        3: [b"\0", {1, 2}],
    }
    assert type(back["counter"]) is collections.Counter


def test_the_models_part_opens_with_the_plain_library_under_the_models_own_names(
    tmp_path: Path,
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    run = tmp_path / "run"
    back = round_trip(run, {"weights": model.state_dict(), "epoch": 1, "score": torch.tensor(0.5)})
    plain = load_file(run / "00000001-step-1" / "model.safetensors")
    assert set(plain) == set(model.state_dict())
    assert list(load_file(run / "00000001-step-1" / "extra.safetensors")) == ["extra.score"]
    # What load_state_dict() looks at besides the tensors.
    assert type(back["weights"]) is collections.OrderedDict
    assert back["weights"]._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]


def test_tied_tensors_are_stored_once_and_come_back_as_one(tmp_path: Path) -> None:
    weight = torch.rand(8, 8)
    run = tmp_path / "run"
    back = round_trip(run, {"weights": {"in": weight, "out": weight.view(8, 8)}})
    assert list(load_file(run / "00000001-step-1" / "model.safetensors")) == ["in"]
    assert back["weights"]["in"] is back["weights"]["out"]
    assert torch.equal(back["weights"]["in"], weight)


def test_no_two_parts_share_a_name(tmp_path: Path) -> None:
    tree = {"moments": [torch.zeros(2)], "weights": {"optimizer[0]": torch.ones(3)}}
    back = round_trip(tmp_path / "run", tree)
    assert torch.equal(back["moments"][0], torch.zeros(2))
    assert torch.equal(back["weights"]["optimizer[0]"], torch.ones(3))


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"hyper": {"fn": print}}, "extra.hyper.fn"),
        ({"weights": {"a.b": object()}}, "a.b"),
        ({"moments": {"x": [torch.ones(1, dtype=torch.complex128)]}}, "optimizer.x[0]"),
        ({"on": {"meta": torch.ones(1, device="meta")}}, "extra.on.meta"),
        ({"$x": 1}, "the key '$x'"),
    ],
    ids=["function", "object in the model", "dtype", "device", "key"],
)
def test_what_cannot_be_saved_is_named(tree: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        packed(tree)
    assert path in str(caught.value)


def test_lazy_tensors_may_change_only_behind_the_capture(tmp_path: Path) -> None:
    lazy, eager = torch.ones(1000), torch.ones(1000)
    content = packed(
        {"weights": {"lazy": lazy, "eager": eager}},
        is_lazy=lambda tensor: tensor.data_ptr() == lazy.data_ptr(),
    )

    def train() -> None:
        eager.zero_()

    save(tmp_path / "run", content, between=train)
    with SavedCheckpoint(str(tmp_path / "run"), "latest") as saved:
        assert torch.equal(unpack(saved)["weights"]["eager"], torch.ones(1000))

    content = packed({"weights": {"lazy": lazy}}, is_lazy=lambda tensor: True)
    assert content.lazy is not None
    assert content.lazy.find_changed() is None
    lazy.add_(1)
    assert content.lazy.find_changed() == "lazy"


def test_a_checkpoint_of_another_interface_is_no_tree(tmp_path: Path) -> None:
    import stillframe.torch

    run = tmp_path / "run"
    with stillframe.torch.Checkpointer(run, model=torch.nn.Linear(2, 2)) as checkpointer:
        checkpointer.save(1)
    with SavedCheckpoint(str(run), "latest") as saved:
        with pytest.raises(DataLoss, match="another interface"):
            unpack(saved)
