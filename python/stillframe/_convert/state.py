"""The state of a training, as state.json has it and as PyTorch users write it to files.

Written: {"model": state_dict, "optimizer": state_dict, "step": int, ...}, plain values and tensors
only, so that torch.load(weights_only=True) takes it. Read: the same, and what is usual besides: a
bare state_dict, and the names of other tutorials for the two.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillframe._convert.source import ExportSource
from stillframe._core.state_json import Encoder, Json, decode, dumps
from stillframe._torch.tensors import spec_of
from stillframe.errors import DataLoss, InvalidArgument

_MODEL_KEYS = ("model", "state_dict", "model_state_dict")
_OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict")
_STEP_KEYS = ("step", "global_step")
_EXTRA_STATE = "_extra_state"
_LISTED_MAX = 10
_STEP_MAX = 2**63 - 1


# --- Out ------------------------------------------------------------------------------------------


def collect(
    source: ExportSource, *, has_integer_keys: bool, only_model: bool
) -> tuple[dict[str, Any], list[str]]:
    """The checkpoint as one dictionary, and what is not in it.

    Args:
        source: the checkpoint.
        has_integer_keys: the optimizer's state is keyed by number, as Optimizer.state_dict() has
            it (with `param_names` beside); else by parameter name, as DCP has it.
        only_model: nothing but the model and the step.
    """
    notes: list[str] = []
    tensors = {name: one for part in source.parts.values() for name, one in part.items()}

    def section(name: str, value: Json) -> Any:
        return _plain_values(decode(value, name, tensor=_finder(tensors)))

    root: dict[str, Any] = {"model": _model(source, section), "step": source.manifest["step"]}
    if only_model:
        return root, notes
    state = source.state
    if "optimizer" in state:
        root["optimizer"] = _optimizers(state["optimizer"], section, has_integer_keys)
        own = [name for name in source.parts.get("optimizer", {}) if ".parameter.#" in name]
        if own:
            notes.append(f"parameters that no model owns are left out: {_listed(own)}")
    for name in ("scheduler", "extra", "rng"):
        if state.get(name) is None:
            continue
        try:
            root[name] = section(name, state[name])
        except InvalidArgument as error:  # A pickle.
            notes.append(f"{name} is left out: {error}")
            continue
        if not has_integer_keys and _has_other_keys(root[name]):
            _as_text(root, name, state[name], notes)
    if not has_integer_keys and _has_other_keys(root.get("optimizer")):
        raise InvalidArgument(
            "the optimizer's state has keys that are no text, which DCP cannot hold; export with "
            "--only model, or --to torch"
        )
    metrics = {name: float(value) for name, value in source.manifest["metrics"].items()}
    if metrics:
        root["metrics"] = metrics
    return root, notes


def _has_other_keys(value: Any) -> bool:
    """Whether a dictionary in it has keys that DCP, which makes texts of all, would change."""
    if isinstance(value, dict):
        return any(type(key) is not str or _has_other_keys(item) for key, item in value.items())
    return isinstance(value, (list, tuple)) and any(map(_has_other_keys, value))


def _as_text(root: dict[str, Any], name: str, encoded: Json, notes: list[str]) -> None:
    """Put a section into `root` as its typed JSON, or leave it out when it has tensors."""
    text = dumps(encoded)
    why = "because DCP makes texts of the keys of dictionaries"
    if '"$tensor"' in text:
        del root[name]
        notes.append(f"{name} is left out, {why}")
    else:
        root[name] = text
        notes.append(f"{name} is stored as JSON text, {why}")


def _model(source: ExportSource, section: Callable[[str, Json], Any]) -> dict[str, Any]:
    model: dict[str, Any] = dict(source.parts.get("model", {}))
    if not model:
        raise InvalidArgument(
            f"the checkpoint has no part model; it has: {_listed(list(source.parts))}"
        )
    for alias, owner in source.metadata["model"].items():
        if owner in model and alias not in model:
            model[alias] = model[owner]
    states = source.state.get("model", {}).get("extra_state", {})
    model.update({name: section(f"model.{name}", value) for name, value in states.items()})
    return model


def _optimizers(
    state: Json, section: Callable[[str, Json], Any], has_integer_keys: bool
) -> dict[str, Any]:
    try:
        if "param_groups" in state:
            return _optimizer("optimizer", state, section, has_integer_keys)
        return {
            name: _optimizer(f"optimizer.{name}", one, section, has_integer_keys)
            for name, one in state.items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise DataLoss(f"state.json: optimizer has another form: {error!r}") from error


def _optimizer(
    path: str, state: Json, section: Callable[[str, Json], Any], has_integer_keys: bool
) -> dict[str, Any]:
    names = [name for group in state["param_groups"] for name in group["params"]]
    values = {
        name: section(f"{path}.state.{name}", value) for name, value in state["state"].items()
    }
    groups = []
    for index, group in enumerate(state["param_groups"]):
        options = section(f"{path}.param_groups[{index}]", group["options"])
        groups.append({**options, "params": list(group["params"])})
    if has_integer_keys:
        numbers = {name: number for number, name in enumerate(names)}
        values = {numbers[name]: value for name, value in values.items()}
        for group in groups:
            group["param_names"] = group["params"]
            group["params"] = [numbers[name] for name in group["params"]]
    return {"state": values, "param_groups": groups}


def _finder(tensors: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    def find(name: str) -> Tensor:
        if name not in tensors:
            raise DataLoss(f"state.json refers to a tensor {name} that no part holds")
        return tensors[name]

    return find


def _plain_values(value: Any) -> Any:
    """The same without NumPy, whose values torch.load(weights_only=True) refuses."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if type(value) in (list, tuple, set):
        return type(value)(_plain_values(item) for item in value)
    if isinstance(value, dict):
        return {_plain_values(key): _plain_values(item) for key, item in value.items()}
    return value


# --- In -------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Imported:
    """What a foreign file holds, in the terms of a checkpoint.

    Attributes:
        parts: tensors by part name and tensor name.
        aliases: other names of tied model tensors, and whose they are.
        state: the text of state.json.
    """

    parts: dict[str, dict[str, Tensor]]
    aliases: dict[str, str]
    state: str
    step: int | None
    metrics: dict[str, float]
    notes: list[str]


def interpret(root: Any, *, only_model: bool, identity: Callable[[Tensor], object]) -> Imported:
    """Find the model, the optimizer and the rest in what a file holds.

    Args:
        root: as torch.load() gives it.
        only_model: leave all but the model and the step out.
        identity: equal for tensors that are the same bytes of the same file.

    Raises:
        InvalidArgument: something cannot be a checkpoint; all such tensors are listed.
    """
    if not isinstance(root, Mapping):
        raise InvalidArgument(f"holds a {type(root).__qualname__}, not a dictionary of tensors")
    rest = dict(root)
    if rest and all(isinstance(value, Tensor) for value in rest.values()):
        model, rest = rest, {}
    else:
        model = _take(rest, _MODEL_KEYS) or {}
    if not isinstance(model, Mapping) or not any(isinstance(v, Tensor) for v in model.values()):
        raise InvalidArgument(
            f"holds no model: its keys are {_listed(list(map(str, root)))}; expected is a "
            f"state_dict, or a dictionary with one as {' or '.join(_MODEL_KEYS)}"
        )
    return _Interpreter(identity).run(model, rest, only_model=only_model)


class _Interpreter:
    def __init__(self, identity: Callable[[Tensor], object]) -> None:
        self._identity = identity
        self._problems: list[str] = []
        self._parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "extra": {}}
        self._aliases: dict[str, str] = {}
        self._notes: list[str] = []

    def run(self, model: Mapping[Any, Any], rest: dict[str, Any], *, only_model: bool) -> Imported:
        members: dict[str, Json] = {"format_version": 1}
        extra_state = self._model(model)
        if extra_state:
            members["model"] = {"extra_state": extra_state}
        step = _take(rest, _STEP_KEYS)
        step = int(step) if isinstance(step, (int, float, Tensor)) else None
        if step is not None and not 0 <= step <= _STEP_MAX:
            step = None
        metrics = _metrics(rest.pop("metrics", None))
        optimizer = _take(rest, _OPTIMIZER_KEYS)
        if only_model:
            self._notes += [f"left out, as asked for: {_listed(sorted(map(str, rest)))}"] * bool(
                rest
            )
        else:
            if optimizer is not None:
                members["optimizer"] = self._optimizers(optimizer)
            for name in ("scheduler", "rng", "extra"):
                if name in rest:
                    members[name] = self._section(name, rest.pop(name))
            if rest:
                self._notes.append(f"left out: {_listed(sorted(map(str, rest)))}")
        if self._problems:
            raise InvalidArgument(f"cannot be stored: {_listed(self._problems)}")
        return Imported(
            parts={name: part for name, part in self._parts.items() if part},
            aliases=self._aliases,
            state=f"{dumps(members)}\n",
            step=step,
            metrics=metrics,
            notes=self._notes,
        )

    def _section(self, name: str, value: Any) -> Json:
        if isinstance(value, str) and value.startswith("{"):
            try:
                # As _as_text() has written it; checked by decoding.
                encoded = json.loads(value)
                decode(encoded, name, tensor=_finder({}))
                return encoded
            except (ValueError, DataLoss):
                pass
        return Encoder(self._lift_extra).encode(_plain_dicts(value), name)

    def _model(self, model: Mapping[Any, Any]) -> dict[str, Json]:
        owners: dict[object, str] = {}
        extra_state: dict[str, Json] = {}
        for name, value in model.items():
            if not isinstance(name, str):
                self._problems.append(f"the model's key {name!r} (a name must be text)")
            elif isinstance(value, Tensor) and not name.endswith(_EXTRA_STATE):
                owner = owners.setdefault(self._identity(value), name)
                if owner != name:
                    self._aliases[name] = owner
                else:
                    self._add("model", name, value)
            elif name.endswith(_EXTRA_STATE):
                encoder = Encoder(self._lift_extra)
                extra_state[name] = encoder.encode(_plain_dicts(value), f"model.{name}")
            else:
                self._problems.append(f"model.{name} (a {type(value).__qualname__}, no tensor)")
        return extra_state

    def _optimizers(self, state: Any) -> Json:
        if not isinstance(state, Mapping):
            raise InvalidArgument(f"optimizer is a {type(state).__qualname__}, not a state_dict")
        if "param_groups" in state:
            return self._optimizer("optimizer", state)
        return {name: self._optimizer(f"optimizer.{name}", one) for name, one in state.items()}

    def _optimizer(self, path: str, state: Mapping[str, Any]) -> Json:
        try:
            groups, names = _named_groups(path, state["param_groups"])
            encoder = Encoder(self._lift_optimizer)
            return {
                "param_groups": [
                    {
                        "params": group["params"],
                        "options": encoder.encode(
                            _plain_dicts(group["options"]), f"{path}.param_groups[{index}]"
                        ),
                    }
                    for index, group in enumerate(groups)
                ],
                "state": {
                    names[key]: encoder.encode(_plain_dicts(value), f"{path}.state.{names[key]}")
                    for key, value in state["state"].items()
                },
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidArgument(
                f"{path} is no state_dict of an optimizer ({error!r}); import with --only model"
            ) from error

    def _lift_optimizer(self, path: str, tensor: Tensor) -> str:
        self._add("optimizer", path, tensor)
        return path

    def _lift_extra(self, path: str, tensor: Tensor) -> str:
        # Names of the part extra, as a Checkpointer gives them.
        if path.startswith("extra"):
            rest = path.removeprefix("extra")
            name = f"extra{rest}" if rest.startswith(".") else f"extra.{rest}"
        else:
            name = f"extra.${path}"
        self._add("extra", name, tensor)
        return name

    def _add(self, part: str, name: str, tensor: Tensor) -> None:
        problem = _problem_of(tensor)
        if problem is None:
            self._parts[part][name] = tensor
        else:
            self._problems.append(f"{name} ({problem})")


def _problem_of(tensor: Tensor) -> str | None:
    """Why a part cannot hold it."""
    if tensor.is_quantized:
        return f"quantised, {tensor.dtype}: save tensor.dequantize(), or its int_repr() and scales"
    if tensor.layout is not torch.strided:
        return f"{tensor.layout}: save its to_dense(), or indices and values"
    if tensor.is_conj() or tensor.is_neg():
        return "a conjugated or negated view: save its resolve_conj().resolve_neg()"
    try:
        spec_of("", tensor)
    except KeyError:
        hint = "save torch.view_as_real() of it" if tensor.is_complex() else "convert it"
        return f"{tensor.dtype}, which safetensors cannot hold: {hint}"
    return None


def _named_groups(
    path: str, groups: list[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[Any, str]]:
    """Groups with parameter names, and each parameter's name by what the state calls it."""
    named: list[dict[str, Any]] = []
    names: dict[Any, str] = {}
    for group in groups:
        own = group.get("param_names", group["params"])
        if not all(isinstance(name, str) for name in own):
            raise InvalidArgument(
                f"{path} counts its parameters and does not name them, so nobody can tell whose "
                "state it is; save it from an optimizer made with model.named_parameters(), or "
                "import with --only model"
            )
        names.update(zip(group["params"], own, strict=True))
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        named.append({"params": list(own), "options": options})
    return named, names


def _take(rest: dict[str, Any], keys: tuple[str, ...]) -> Any:
    for key in keys:
        if rest.get(key) is not None:
            return rest.pop(key)
    return None


def _metrics(value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        return {}
    return {
        str(name): float(number)
        for name, number in value.items()
        if isinstance(number, (int, float))
    }


def _plain_dicts(value: Any) -> Any:
    """The same with OrderedDict, Counter and their like as the dicts that they are."""
    if isinstance(value, dict):
        return {key: _plain_dicts(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain_dicts(item) for item in value)
    return value


def _listed(names: list[str]) -> str:
    more = len(names) - _LISTED_MAX
    text = ", ".join(names[:_LISTED_MAX])
    return f"{text} and {more} more" if more > 0 else text
