"""Restoring optimizers: state by parameter name, in place where it exists, and hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stillframe._core.saved import SavedCheckpoint
from stillframe._core.state_json import decode
from stillframe._torch.restore_plan import Problems, Targets
from stillframe._torch.tensors import (
    ModelTensors,
    is_dtensor,
    local_tensor,
    parameter_names,
    torch_dtype,
)
from stillframe.errors import DataLoss

Apply = Callable[[], None]


class OptimizerPlan:
    """Compares the optimizers with a checkpoint and says what to do after the read."""

    def __init__(
        self,
        saved: SavedCheckpoint,
        models: ModelTensors,
        mapped: Mapping[str, str],
        targets: Targets,
        problems: Problems,
        *,
        allow_pickle: bool,
    ) -> None:
        self._saved = saved
        self._models = models
        self._targets = targets
        self._problems = problems
        self._allow_pickle = allow_pickle
        # What the checkpoint calls a parameter -> what the model calls it.
        self._live_names: dict[str, str] = {}
        aliases = saved.aliases("model")
        for name, new in mapped.items():
            canonical = models.canonical(new)
            if canonical in models.tensors:
                self._live_names[aliases.get(name, name)] = canonical

    def plan(self, optimizers: Mapping[str | None, Optimizer]) -> list[Apply]:
        """Add the targets; return what sets the rest once they are filled."""
        state = self._saved.state.get("optimizer")
        if not optimizers:
            if state is not None:
                self._problems.unknown(["optimizer (pass optimizer=, or leave it out by only=)"])
            return []
        if state is None:
            self._problems.missing(["optimizer"])
            return []
        if None in optimizers:
            states = {None: state}
        else:
            states = state
            self._problems.missing([f"optimizer.{n}" for n in optimizers if n not in states])
            self._problems.unknown([f"optimizer.{n}" for n in states if n not in optimizers])
        after = []
        for name, optimizer in optimizers.items():
            if name in states:
                path = "optimizer" if name is None else f"optimizer.{name}"
                try:
                    after += self._plan_one(path, optimizer, states[name])
                except (KeyError, TypeError, AttributeError, IndexError) as error:
                    raise DataLoss(f"state.json: {path} has another form: {error!r}") from error
        return after

    def _plan_one(self, path: str, optimizer: Optimizer, state: dict[str, Any]) -> list[Apply]:
        named = parameter_names(self._models, optimizer)
        parameters = dict(named)
        group_of_saved = {
            self._live_names.get(name, name): index
            for index, group in enumerate(state["param_groups"])
            for name in group["params"]
        }
        self._problems.missing([f"{path}: {n}" for n in parameters if n not in group_of_saved])
        self._problems.unknown([f"{path}: {n}" for n in group_of_saved if n not in parameters])
        for name, parameter in named:
            if name.startswith("#"):
                self._plan_own_parameter(f"{path}.parameter.{name}", parameter)
        after = self._plan_groups(path, optimizer, state, named, group_of_saved)
        after.append(self._plan_state(path, optimizer, state, parameters))
        return after

    def _plan_own_parameter(self, name: str, parameter: Tensor) -> None:
        """A parameter that no model owns is saved with its optimizer."""
        source = self._saved.tensors.get("optimizer", {}).get(name)
        if source is None:
            self._problems.missing([name])
        elif self._problems.fits(name, source.spec, parameter):
            self._targets.add(source, name, parameter)

    def _plan_groups(
        self,
        path: str,
        optimizer: Optimizer,
        state: dict[str, Any],
        named: list[tuple[str, Tensor]],
        group_of_saved: Mapping[str, int],
    ) -> list[Apply]:
        after: list[Apply] = []
        rest = iter(named)
        for index, group in enumerate(optimizer.param_groups):
            names = [next(rest)[0] for _ in group["params"]]
            wanted = {group_of_saved[name] for name in names if name in group_of_saved}
            if len(wanted) > 1:
                self._problems.other(
                    f"{path}: group {index} has parameters of several groups of the checkpoint: "
                    f"{sorted(wanted)}"
                )
            if len(wanted) != 1:
                continue
            saved_options = state["param_groups"][wanted.pop()]["options"]
            existing = _tensors_of(group, saved_options)
            where = f"{path}.param_groups[{index}]"
            options = _members_of(self._decode(saved_options, where, existing, None), where)
            if "params" in options:
                raise DataLoss(f"state.json: {where} names its parameters among its options")
            after.append(_updater(group, options))
        return after

    def _plan_state(
        self,
        path: str,
        optimizer: Optimizer,
        state: dict[str, Any],
        parameters: Mapping[str, Tensor],
    ) -> Apply:
        restored: list[tuple[Tensor, Any]] = []
        steps_on_device = {
            id(parameter)
            for group in optimizer.param_groups
            if group.get("fused") or group.get("capturable")
            for parameter in group["params"]
        }
        for saved_name, entry in state["state"].items():
            parameter = parameters.get(self._live_names.get(saved_name, saved_name))
            if parameter is None:
                continue  # Listed already: its group names it too.
            whole = self._saved.tensors.get("model", {}).get(saved_name)
            if whole is not None and whole.spec.shape != tuple(parameter.shape):
                continue  # Moments of another shape would break the next step.
            live = optimizer.state.get(parameter, {})
            where = f"{path}.state.{saved_name}"
            existing = _tensors_of(live, entry)
            decoded = self._decode(
                entry, where, existing, parameter, id(parameter) not in steps_on_device
            )
            value = _members_of(decoded, where)
            restored.append((parameter, value))

        def apply() -> None:
            # As load_state_dict(): what the checkpoint has no state for has none.
            kept = {id(parameter) for parameter, _ in restored}
            for parameter in list(optimizer.state):
                if id(parameter) not in kept:
                    del optimizer.state[parameter]
            for parameter, value in restored:
                live = optimizer.state[parameter]
                live.clear()
                live.update(value)

        return apply

    def _decode(
        self,
        value: Any,
        path: str,
        existing: Mapping[str, Tensor],
        parameter: Tensor | None,
        keeps_step_on_cpu: bool = True,
    ) -> Any:
        def tensor(name: str) -> Tensor:
            saved = self._targets.saved(name)
            live = existing.get(name)
            # As load_state_dict(): state lies with its parameter, but for the count of steps.
            is_step = name.endswith(".step") and keeps_step_on_cpu
            device = None if parameter is None or is_step else parameter.device
            if live is not None and self._problems.fits(name, saved.spec, live):
                self._targets.add(saved, name, live)
                return live
            if parameter is None or is_step or tuple(parameter.shape) != saved.spec.shape:
                return self._targets.add_new(name, device)
            made = _like(parameter, torch_dtype(saved.spec.dtype))
            self._targets.add(saved, name, made)
            return made

        return decode(value, path, tensor=tensor, allow_pickle=self._allow_pickle)


def _members_of(value: Any, path: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise DataLoss(f"state.json: {path} has no members")
    return value


def _tensors_of(live: Mapping[str, Any], entry: Any) -> dict[str, Tensor]:
    """The live tensors that stand where the checkpoint refers to one, by the checkpoint's name."""
    found = {}
    if isinstance(entry, dict):
        for key, value in entry.items():
            tensor = live.get(key)
            if isinstance(value, dict) and "$tensor" in value and isinstance(tensor, Tensor):
                found[value["$tensor"]] = tensor
    return found


def _like(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """New memory with the parameter's strides, as optimizers make their moments."""
    local = local_tensor("parameter", parameter).detach()
    made = torch.empty_like(local, dtype=dtype, memory_format=torch.preserve_format)
    if not is_dtensor(parameter):
        return made
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        made,
        parameter.device_mesh,  # type: ignore[attr-defined]
        parameter.placements,  # type: ignore[attr-defined]
        run_check=False,
    )


def _updater(group: dict[str, Any], options: dict[str, Any]) -> Apply:
    return lambda: group.update(options)
