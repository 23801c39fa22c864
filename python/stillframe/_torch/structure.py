"""Models of torch's own modules, described by the arguments of their constructors.

A description is kept only if it is true: the module that it makes, on the meta device, is compared
with the one at hand, attribute by attribute.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillframe._core.state_json import Encoder, Json, decode
from stillframe.errors import DataLoss, InvalidArgument

_CONTAINERS: dict[str, type[nn.Module]] = {
    "Sequential": nn.Sequential,
    "ModuleList": nn.ModuleList,
    "ModuleDict": nn.ModuleDict,
}
# Where the device and the dtype are the tensors' own business, or what torch only keeps for old
# callers.
_IGNORED_ARGUMENTS = frozenset(
    {"self", "args", "kwargs", "device", "dtype", "size_average", "reduce", "min_value"}
    | {"max_value"}
)
# Besides every module's own: what torch.compile, and Lightning's in its place, leave on a module
# that they have wrapped.
_COMPILE_MARKS = {"_is_torch_compile", "_compile_kwargs"}
_BASE_ATTRIBUTES = frozenset(nn.Module().__dict__) | _COMPILE_MARKS
_HOOKS = tuple(name for name in sorted(_BASE_ATTRIBUTES) if "hook" in name and name[0] == "_")
_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
}


class NotDescribable(Exception):
    """The model cannot be described; the text says which module, and why."""


def describe(model: nn.Module) -> Json:
    """Describe a model of torch's own modules.

    Raises:
        NotDescribable: it has another module in it, or one that its constructor's arguments do not
            make.
    """
    return _Describer().node(model, "")


def build(node: Json) -> nn.Module:
    """Make the model that describe() described; nothing but torch.nn's classes is called.

    Raises:
        DataLoss: it is no such description.
    """
    try:
        return _Builder().module(node, "")
    except (AttributeError, KeyError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, DataLoss):
            raise
        raise DataLoss(f"the model's description does not make a model: {error}") from error


class _Describer:
    def __init__(self) -> None:
        self._known: dict[int, str] = {}

    def node(self, module: nn.Module, path: str) -> Json:
        if id(module) in self._known:
            return {"same": self._known[id(module)]}
        self._known[id(module)] = path
        name = type(module).__name__
        if _own_module(name) is not type(module):
            raise NotDescribable(
                f"{path or 'the model'} is a {type(module).__module__}.{type(module).__qualname__}"
            )
        hooks = [hook for hook in _HOOKS if getattr(module, hook)]
        if hooks:
            raise NotDescribable(f"{path or 'the model'} ({name}) has hooks: {', '.join(hooks)}")
        if name in _CONTAINERS:
            return self._container(name, module, path)
        node = {"class": name, "arguments": self._arguments(module, path)}
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = build(node)
        except DataLoss as error:
            raise NotDescribable(f"{path or 'the model'} ({name}): {error}") from error
        _compare(module, made, path)
        # Children were made with it.
        for child, inner in module.named_modules():
            self._known.setdefault(id(inner), f"{path}.{child}".strip("."))
        return node

    def _container(self, name: str, module: nn.Module, path: str) -> Json:
        own = sorted(set(module.__dict__) - _BASE_ATTRIBUTES)
        tensors = [*module._parameters, *module._buffers]
        if own or tensors:
            raise NotDescribable(
                f"{path or 'the model'} ({name}) has attributes of its own: "
                f"{', '.join([*own, *tensors])}"
            )
        children: list[Json] = []
        for key, child in module._modules.items():
            if child is None:
                raise NotDescribable(f"{path}.{key} is None")
            children.append([key, self.node(child, f"{path}.{key}".strip("."))])
        return {"class": name, "children": children}

    def _arguments(self, module: nn.Module, path: str) -> Json:
        special = _SPECIAL.get(type(module).__name__)
        if special is not None:
            arguments = special(module)
        else:
            arguments = {}
            for name in _argument_names(type(module)):
                value = _argument(module, name)
                if value is not _ABSENT:
                    arguments[name] = value
        encoded: dict[str, Json] = {}
        for name, value in arguments.items():
            if isinstance(value, nn.Module):
                encoded[name] = {"$module": _Describer().node(value, f"{path}.{name}")}
                continue
            try:
                encoded[name] = Encoder(_no_tensor).encode(value, name)
            except InvalidArgument as error:
                raise NotDescribable(f"{path or 'the model'}: {error}") from error
        return encoded


class _Builder:
    def __init__(self) -> None:
        self._made: dict[str, nn.Module] = {}

    def module(self, node: Json, path: str) -> nn.Module:
        if "same" in node:
            made = self._made.get(node["same"])
            if made is None:
                raise DataLoss(f"{path} is said to be {node['same']}, which is not there")
            return made
        name = node["class"]
        kind = _own_module(name)
        if kind is None:
            raise DataLoss(f"torch.nn has no module {name}")
        if name in _CONTAINERS:
            made = kind()
            self._made[path] = made
            for key, child in node["children"]:
                made.add_module(key, self.module(child, f"{path}.{key}".strip(".")))
            return made
        made = kind(
            **{key: self._value(value, f"{path}.{key}") for key, value in node["arguments"].items()}
        )
        for child, inner in made.named_modules():
            self._made[f"{path}.{child}".strip(".")] = inner
        return made

    def _value(self, value: Json, path: str) -> Any:
        if isinstance(value, dict) and "$module" in value:
            return _Builder().module(value["$module"], path)
        return decode(value, path, tensor=_no_tensor_back)


def _own_module(name: str) -> type[nn.Module] | None:
    """The layer or container of that name in torch.nn; wrappers of other packages are none."""
    kind = getattr(nn, name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        return None
    return kind if kind.__module__.startswith("torch.nn.modules.") else None


_ABSENT = object()


def _argument_names(kind: type[nn.Module]) -> list[str]:
    if issubclass(kind, nn.RNNBase):
        names = set(inspect.signature(nn.RNNBase.__init__).parameters) - {"mode"}
        if kind is not nn.LSTM:
            names -= {"proj_size"}
        if kind is nn.RNN:
            names |= {"nonlinearity"}
    else:
        names = set(inspect.signature(kind.__init__).parameters)
    return sorted(
        name for name in names if name not in _IGNORED_ARGUMENTS and not name.startswith("_")
    )


def _argument(module: nn.Module, name: str) -> Any:
    if name == "add_bias_kv":
        return getattr(module, "bias_k", None) is not None
    if name == "bias" and isinstance(module, nn.MultiheadAttention):
        return module.in_proj_bias is not None
    value = getattr(module, name, _ABSENT)
    # Constructors take a flag and keep a tensor or None.
    if name in ("bias", "head_bias"):
        return isinstance(value, Tensor) or value is True
    return value


def _encoder_layer(layer: Any) -> dict[str, Any]:
    activation = next((k for k, v in _ACTIVATIONS.items() if layer.activation is v), None)
    if activation is None:
        raise NotDescribable("a transformer layer with an activation other than relu and gelu")
    return {
        "d_model": layer.self_attn.embed_dim,
        "nhead": layer.self_attn.num_heads,
        "dim_feedforward": layer.linear1.out_features,
        "dropout": layer.dropout.p,
        "activation": activation,
        "layer_norm_eps": layer.norm1.eps,
        "batch_first": layer.self_attn.batch_first,
        "norm_first": layer.norm_first,
        "bias": layer.linear1.bias is not None,
    }


def _stack(first: str, *names: str) -> Callable[[Any], dict[str, Any]]:
    def arguments(stack: Any) -> dict[str, Any]:
        if not len(stack.layers):
            raise NotDescribable("a transformer without layers")
        named = {name: getattr(stack, name) for name in names}
        return {first: stack.layers[0], **named}

    return arguments


# Those whose attributes are not called as the constructor's arguments are.
_SPECIAL: dict[str, Callable[[Any], dict[str, Any]]] = {
    "TransformerEncoderLayer": _encoder_layer,
    "TransformerDecoderLayer": _encoder_layer,
    "TransformerEncoder": _stack(
        "encoder_layer", "num_layers", "norm", "enable_nested_tensor", "mask_check"
    ),
    "TransformerDecoder": _stack("decoder_layer", "num_layers", "norm"),
}


def _compare(module: nn.Module, made: nn.Module, path: str) -> None:
    """Refuse a description that made something else."""

    def differs(what: str) -> NotDescribable:
        name = type(module).__name__
        return NotDescribable(
            f"{path or 'the model'} ({name}) is not what its constructor makes: {what} differs"
        )

    if type(module) is not type(made):
        raise differs("its class")
    for kind in ("_parameters", "_buffers"):
        ours, theirs = getattr(module, kind), getattr(made, kind)
        if _shapes(ours) != _shapes(theirs):
            raise differs(kind.strip("_"))
    if module._non_persistent_buffers_set != made._non_persistent_buffers_set:
        raise differs("which buffers are state")
    ours, theirs = _attributes(module), _attributes(made)
    if ours.keys() != theirs.keys():
        raise differs(", ".join(sorted(ours.keys() ^ theirs.keys())))
    for name, value in ours.items():
        if not _is_same(value, theirs[name]):
            raise differs(name)
    if module._modules.keys() != made._modules.keys():
        raise differs("its children")
    for name, child in module._modules.items():
        other = made._modules[name]
        if child is None or other is None:
            if child is not other:
                raise differs(name)
            continue
        if any(getattr(child, hook) for hook in _HOOKS):
            raise NotDescribable(f"{path}.{name} has hooks")
        _compare(child, other, f"{path}.{name}".strip("."))


def _shapes(tensors: dict[str, Tensor | None]) -> dict[str, Any]:
    return {name: None if one is None else tuple(one.shape) for name, one in tensors.items()}


def _attributes(module: nn.Module) -> dict[str, Any]:
    # RNNs keep their own parameters once more, flat.
    return {
        name: value
        for name, value in module.__dict__.items()
        if name not in _BASE_ATTRIBUTES and not name.startswith("_flat_weight")
    }


def _is_same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other) or isinstance(one, (Tensor, nn.Module)):
        return False
    return bool(one == other)


def _no_tensor(path: str, tensor: Tensor) -> str:
    raise InvalidArgument(f"{path} is a tensor")


def _no_tensor_back(name: str) -> Tensor:
    raise DataLoss(f"a model's description refers to a tensor {name}")
