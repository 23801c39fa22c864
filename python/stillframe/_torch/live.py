"""The tensors that a save takes: models', optimizers' and averages', in the order of the layout.

Collected once and kept while the same objects stand in the same places; `is_current()` finds that
out in a few hundred nanoseconds per tensor.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from stillframe._core.layout import PartSpec, TensorSpec
from stillframe._core.state_json import Encoder, Json, child_path, dumps
from stillframe._torch.tensors import (
    ModelTensors,
    collect_ema,
    collect_models,
    local_tensor,
    parameter_names,
    spec_of,
)
from stillframe.errors import InvalidArgument

Metadata = tuple[tuple[str, str], ...]

_VERSION = attrgetter("_version")
FORMAT: tuple[str, str] = ("format", "pt")


@dataclasses.dataclass(slots=True)
class LiveTensor:
    """One tensor of the layout.

    Attributes:
        memory: the plain tensor whose memory is read; `alias` keeps that memory when the user's
            tensor is given another one.
        is_lazy: an optimizer's parameter or state: nothing but its step() writes it.
    """

    spec: TensorSpec
    memory: Tensor
    alias: Tensor
    is_lazy: bool


@dataclasses.dataclass
class _OptimizerText:
    """What of an optimizer's JSON stays as it is: one text per group, one for the state."""

    name: str | None
    path: str
    optimizer: Optimizer
    group_parameters: list[str]
    state: str


class LiveState:
    """All tensors of models, optimizers and averages now, and the JSON that goes with them.

    Args:
        models: by name; None is the one that has none.
        optimizers: likewise.
        ema: modules whose tensors make a part of their own.
        allow_pickle: for hyper-parameters that have no form in state.json.

    Raises:
        InvalidArgument: something cannot be saved; the message names it.
    """

    def __init__(
        self,
        models: Mapping[str | None, nn.Module],
        optimizers: Mapping[str | None, Optimizer],
        *,
        allow_pickle: bool,
        ema: Mapping[str | None, nn.Module] | None = None,
    ) -> None:
        self._allow_pickle = allow_pickle
        self._watched = _Watched()
        self._holders = [(one, one.state, one.param_groups) for one in optimizers.values()]
        self._is_volatile = False
        self.has_pickle = False
        self.models: ModelTensors = collect_models(models)
        averages = collect_ema(ema or {})
        for container in chain(self.models.containers, averages.containers):
            self._observe(container)

        stepped = {
            id(parameter)
            for optimizer in optimizers.values()
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        model_tensors = [
            _live(name, tensor, is_lazy=id(tensor) in stepped)
            for name, tensor in self.models.tensors.items()
        ]
        self._optimizer_tensors: list[LiveTensor] = []
        self._texts = [self._optimizer(name, one) for name, one in optimizers.items()]
        self._lifted: list[tuple[str, Tensor]] = []
        self.encode_optimizers()
        for name, tensor in self._lifted:
            self._optimizer_tensors.append(_live(name, tensor, is_lazy=False))

        self.tensors = _in_file_order(model_tensors)
        self.parts = [
            PartSpec(
                "model",
                tuple(tensor.spec for tensor in self.tensors),
                (FORMAT, *sorted(self.models.aliases.items())),
            )
        ]
        if self._optimizer_tensors:
            ordered = _in_file_order(self._optimizer_tensors)
            self.parts.append(
                PartSpec("optimizer", tuple(tensor.spec for tensor in ordered), (FORMAT,))
            )
            self.tensors += ordered
        if averages.tensors:
            ordered = _in_file_order(
                [
                    _live(name, tensor, is_lazy=id(tensor) in stepped)
                    for name, tensor in averages.tensors.items()
                ]
            )
            metadata = (FORMAT, *sorted(averages.aliases.items()))
            self.parts.append(PartSpec("ema", tuple(one.spec for one in ordered), metadata))
            self.tensors += ordered
        _check_distinct(self.parts)
        lazy = [tensor for tensor in self.tensors if tensor.is_lazy]
        self.lazy_aliases = [tensor.alias for tensor in lazy]
        self._lazy = lazy
        self._lazy_names: dict[tuple[object, ...], str] | None = None
        self._groups = [
            _Group(self.tensors[at : at + _GROUP_SIZE])
            for at in range(0, len(self.tensors), _GROUP_SIZE)
        ]
        self._counters: list[int] | None = None
        # The GPUs that have a tensor.
        self.devices = sorted({one.memory.get_device() for one in self.tensors} - {-1})

    def is_current(self) -> bool:
        """Whether collecting again would find the same tensors at the same addresses.

        Reads their version counters in the same visit, for versions().
        """
        self._counters = None
        if self._is_volatile:
            return False
        # load_state_dict() puts new containers in place of both.
        for optimizer, state, groups in self._holders:
            if optimizer.state is not state or optimizer.param_groups is not groups:
                return False
        if not self._watched.is_unchanged():
            return False
        counters: list[int] = []
        for group in self._groups:
            if not group.is_in_place():
                return False
            counters += group.counters()
        self._counters = counters
        return True

    def versions(self) -> list[int]:
        """The version counters of the lazy tensors: most writes raise them, not all.

        Those that is_current() has just read, once: before the save, which is early enough.
        """
        counters, self._counters = self._counters, None
        return counters if counters is not None else self._read_counters()

    def first_changed(self, before: list[int]) -> str | None:
        """The name of a lazy tensor whose counter has moved since versions() gave `before`."""
        now = self._read_counters()
        if now == before:
            return None
        names = chain.from_iterable(group.counted_names for group in self._groups)
        moved = zip(names, before, now, strict=True)
        return next(name for name, old, new in moved if old != new)

    def _read_counters(self) -> list[int]:
        return list(chain.from_iterable(group.counters() for group in self._groups))

    def lazy_name(self, tensor: Tensor) -> str | None:
        """The name of the lazy tensor that is the same memory, seen in the same way."""
        if self._lazy_names is None:
            self._lazy_names = {_place(one.memory): one.spec.name for one in self._lazy}
        return self._lazy_names.get(_place(tensor)) if tensor.numel() else None

    def encode_optimizers(self) -> tuple[Json, bool]:
        """The JSON text of state.json's `optimizer`, and whether this object still fits.

        Hyper-parameters change at any time, so they are encoded at each save.
        """
        lifted: list[tuple[str, Tensor]] = []

        def lift(path: str, tensor: Tensor) -> str:
            lifted.append((path, tensor))
            return path

        encoder = Encoder(lift, allow_pickle=self._allow_pickle)
        texts: dict[str | None, str] = {}
        for known in self._texts:
            groups = []
            for index, group in enumerate(known.optimizer.param_groups):
                options = {key: value for key, value in group.items() if key not in _NO_OPTIONS}
                encoded = encoder.encode(options, f"{known.path}.param_groups[{index}]")
                groups.append(
                    f'{{"params": {known.group_parameters[index]}, "options": {dumps(encoded)}}}'
                )
            texts[known.name] = f'{{"param_groups": [{", ".join(groups)}], "state": {known.state}}}'
        self.has_pickle |= encoder.has_pickle
        fits = len(lifted) == len(self._lifted) and all(
            path == known_path and tensor is known_tensor
            for (path, tensor), (known_path, known_tensor) in zip(lifted, self._lifted, strict=True)
        )
        self._lifted = lifted
        if None in texts:
            return texts[None], fits
        members = ", ".join(f"{dumps(name)}: {text}" for name, text in texts.items())
        return f"{{{members}}}", fits

    def _optimizer(self, name: str | None, optimizer: Optimizer) -> _OptimizerText:
        path = "optimizer" if name is None else f"optimizer.{name}"
        named = parameter_names(self.models, optimizer)
        self._observe(optimizer.param_groups)
        self._observe(optimizer.state)
        groups = []
        rest = iter(named)
        for group in optimizer.param_groups:
            self._observe(group["params"])
            groups.append(dumps([next(rest)[0] for _ in group["params"]]))

        state: dict[str, Json] = {}
        encoder = Encoder(
            self._add_optimizer_tensor, allow_pickle=self._allow_pickle, observe=self._observe
        )
        for parameter_name, parameter in named:
            if parameter_name.startswith("#"):
                self._add_optimizer_tensor(f"{path}.parameter.{parameter_name}", parameter)
            if parameter in optimizer.state:
                # Not by the path of the dict's own keys: torch keys it by parameter.
                state[parameter_name] = encoder.encode(
                    optimizer.state[parameter], f"{path}.state.{parameter_name}"
                )
        if len(state) != len(optimizer.state):
            strangers = [
                child_path(f"{path}.state", key)
                for key in optimizer.state
                if not any(key is parameter for _, parameter in named)
            ]
            raise InvalidArgument(
                f"{', '.join(strangers)[:500]}: state that belongs to no parameter of the optimizer"
            )
        self.has_pickle |= encoder.has_pickle
        return _OptimizerText(name, path, optimizer, groups, dumps(state))

    def _add_optimizer_tensor(self, path: str, tensor: Tensor) -> str:
        self._optimizer_tensors.append(_live(path, tensor, is_lazy=True))
        return path

    def _observe(self, container: Any) -> None:
        if container is None:
            self._is_volatile = True
            return
        self._watched.add(container)


# So few that their objects fit a second-level cache together: what one look at them has fetched is
# still there for the next.
_GROUP_SIZE = 256


class _Group:
    """Neighbouring tensors of the layout; looked at in C, about half a microsecond each."""

    def __init__(self, tensors: list[LiveTensor]) -> None:
        self._memories = [tensor.memory for tensor in tensors]
        self._aliases = [tensor.alias for tensor in tensors]
        # Reading the counter of an inference tensor raises.
        counted = [one for one in tensors if one.is_lazy and not one.alias.is_inference()]
        self._counted = [tensor.memory for tensor in counted]
        self.counted_names = [tensor.spec.name for tensor in counted]

    def is_in_place(self) -> bool:
        """Whether each has the storage, offset, sizes and strides that it had."""
        return all(map(Tensor.is_set_to, self._memories, self._aliases))

    def counters(self) -> list[int]:
        """The version counters of the lazy ones."""
        return list(map(_VERSION, self._counted))


class _Watched:
    """Containers and the objects in them. Loops in C: a save looks at hundreds of containers."""

    def __init__(self) -> None:
        self._dicts: list[dict[Any, Any]] = []
        self._dict_sizes: list[int] = []
        self._dict_items: list[Any] = []
        self._lists: list[list[Any]] = []
        self._list_sizes: list[int] = []
        self._list_items: list[Any] = []

    def add(self, container: dict[Any, Any] | list[Any]) -> None:
        """Watch it as it is now."""
        if isinstance(container, dict):
            self._dicts.append(container)
            self._dict_sizes.append(len(container))
            self._dict_items.extend(container.values())
        else:
            self._lists.append(container)
            self._list_sizes.append(len(container))
            self._list_items.extend(container)

    def is_unchanged(self) -> bool:
        """Whether each still holds the same objects."""
        dict_items = chain.from_iterable(map(dict.values, self._dicts))
        return (
            list(map(len, self._dicts)) == self._dict_sizes
            and list(map(len, self._lists)) == self._list_sizes
            and all(map(is_, dict_items, self._dict_items))
            and all(map(is_, chain.from_iterable(self._lists), self._list_items))
        )


# torch's own bookkeeping of names, which the text of the group's parameters says already.
_NO_OPTIONS = frozenset({"params", "param_names"})


def _live(name: str, tensor: Tensor, *, is_lazy: bool) -> LiveTensor:
    memory = local_tensor(name, tensor)
    return LiveTensor(spec_of(name, memory), memory, memory.detach(), is_lazy)


def _place(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _check_distinct(parts: list[PartSpec]) -> None:
    """No two parts may share a name: other readers merge all files of a directory."""
    names: set[str] = set()
    for part in parts:
        for tensor in part.tensors:
            if tensor.name in names:
                raise InvalidArgument(
                    f"two parts have a tensor named {tensor.name}; give the model a name by "
                    'model={"NAME": model}'
                )
            names.add(tensor.name)


def _in_file_order(tensors: list[LiveTensor]) -> list[LiveTensor]:
    ordered = sorted(tensors, key=lambda tensor: tensor.spec.file_order)
    for before, after in itertools.pairwise(ordered):
        if before.spec.name == after.spec.name:
            raise InvalidArgument(f"two tensors have the name {after.spec.name}")
    return ordered
