"""Which tensors are found, under which names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from stillframe._torch.live import LiveState
from stillframe.errors import InvalidArgument


def live(
    model: nn.Module | dict[str, nn.Module], optimizer: torch.optim.Optimizer | None = None
) -> LiveState:
    models: Any = model if isinstance(model, dict) else {None: model}
    return LiveState(models, {None: optimizer} if optimizer else {}, allow_pickle=False)


def model_names(state: LiveState) -> set[str]:
    return {tensor.name for tensor in state.parts[0].tensors}


def simple() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def stepped_adam(model: nn.Module, **options: Any) -> torch.optim.Adam:
    optimizer = torch.optim.Adam(model.parameters(), **options)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_names_are_those_of_state_dict() -> None:
    model = simple()
    assert model_names(live(model)) == set(model.state_dict())


def test_buffers_that_are_not_persistent_are_left_out() -> None:
    model = simple()
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    assert model_names(live(model)) == set(model.state_dict())


def test_the_prefix_of_torch_compile_is_taken_off() -> None:
    model = simple()
    compiled = torch.compile(model)
    assert "_orig_mod.0.weight" in compiled.state_dict()
    assert model_names(live(compiled)) == set(model.state_dict())


def test_the_prefix_of_data_parallel_is_taken_off_at_any_depth() -> None:
    inner = simple()
    outer = nn.ModuleDict({"left": nn.DataParallel(inner), "module": nn.Linear(2, 2)})
    expected = {f"left.{name}" for name in inner.state_dict()} | {"module.weight", "module.bias"}
    assert model_names(live(outer)) == expected


def test_the_prefix_of_ddp_is_taken_off(tmp_path: Any) -> None:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model = simple()
        names = set(model.state_dict())
        assert model_names(live(nn.parallel.DistributedDataParallel(model))) == names
    finally:
        dist.destroy_process_group()


def test_fully_sharded_parameters_of_one_rank_are_taken_as_they_are(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model = nn.Linear(3, 4)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        state = live(model)
        assert model_names(state) == {"weight", "bias"}
        assert {tensor.spec.shape for tensor in state.tensors} == {(4, 3), (4,)}
    finally:
        dist.destroy_process_group()


def test_a_child_that_is_only_spelt_like_a_wrapper_keeps_its_name() -> None:
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    model._orig_mod = nn.Linear(2, 2)
    assert model_names(live(model)) == set(model.state_dict())


def test_tied_tensors_are_taken_once_and_their_other_names_recorded() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    state = live(model)
    assert model_names(state) == {"a.weight"}
    assert state.parts[0].metadata == (("format", "pt"), ("b.weight", "a.weight"))


def test_empty_tensors_are_not_taken_for_tied() -> None:
    model = nn.Module()
    model.a = nn.Parameter(torch.empty(0, 2))
    model.b = nn.Parameter(torch.empty(0, 2))
    assert model_names(live(model)) == {"a", "b"}


def test_several_models_prefix_their_names() -> None:
    state = live({"g": nn.Linear(1, 1), "d": nn.Linear(1, 1)})
    assert model_names(state) == {"g.weight", "g.bias", "d.weight", "d.bias"}


def test_optimizer_state_is_named_by_parameter_and_lazy_like_it() -> None:
    model = simple()
    state = live(model, stepped_adam(model))
    names = {tensor.name for tensor in state.parts[1].tensors}
    assert "optimizer.state.0.weight.exp_avg" in names
    assert "optimizer.state.1.bias.step" in names
    lazy = {tensor.spec.name for tensor in state.tensors if tensor.is_lazy}
    assert lazy == names | {name for name, _ in model.named_parameters()}


def test_a_parameter_without_a_model_is_saved_with_its_optimizer() -> None:
    model = simple()
    temperature = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([*model.parameters(), temperature], momentum=0.9)
    names = {tensor.name for tensor in live(model, optimizer).parts[1].tensors}
    assert names == {"optimizer.parameter.#0.4"}


def test_a_tensor_hyper_parameter_is_copied_before_save_returns() -> None:
    model = simple()
    state = live(model, stepped_adam(model, lr=torch.tensor(0.1), foreach=False))
    (rate,) = [t for t in state.tensors if t.spec.name == "optimizer.param_groups[0].lr"]
    assert not rate.is_lazy


def test_nothing_is_collected_again_while_nothing_moved() -> None:
    model = simple()
    optimizer = stepped_adam(model)
    state = live(model, optimizer)
    optimizer.step()
    model(torch.randn(5, 3))
    optimizer.param_groups[0]["lr"] = 0.5
    assert state.is_current()


@pytest.mark.parametrize(
    "change",
    [
        lambda model, optimizer: setattr(model[0].weight, "data", torch.zeros(4, 3)),
        lambda model, optimizer: setattr(model[0], "weight", nn.Parameter(torch.zeros(4, 3))),
        lambda model, optimizer: setattr(model[0].weight, "data", model[0].weight.data[:2]),
        lambda model, optimizer: model.append(nn.Linear(1, 1)),
        lambda model, optimizer: model[0].register_buffer("mask", torch.ones(1)),
        lambda model, optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
        lambda model, optimizer: optimizer.state.clear(),
        lambda model, optimizer: optimizer.add_param_group(
            {"params": [nn.Parameter(torch.ones(1))]}
        ),
    ],
    ids=["data", "parameter", "shape", "module", "buffer", "loaded", "cleared", "group"],
)
def test_whatever_moved_is_seen(change: Any) -> None:
    model = simple()
    optimizer = stepped_adam(model)
    state = live(model, optimizer)
    change(model, optimizer)
    assert not state.is_current()


class OwnWay(nn.Linear):
    """A module that writes its state itself, as quantized ones do."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}packed"] = self.weight.detach()


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Linear(2, 2, device="meta"), "weight is on the meta device.*to_empty"),
        (nn.Linear(2, 2, dtype=torch.complex128), "weight is torch.complex128"),
        (nn.LazyLinear(2), "weight has no shape yet"),
        (OwnWay(2, 2), "OwnWay.*own way"),
    ],
    ids=["device", "dtype", "lazy", "own"],
)
def test_what_cannot_be_saved_is_named(module: nn.Module, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        live(module)
