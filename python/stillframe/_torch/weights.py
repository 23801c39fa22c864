"""The weights of a checkpoint, and how they get into a model that was just made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillframe._core.saved import Place, SavedCheckpoint, SavedTensor
from stillframe._torch.memory import MappedPart, prefer_huge_pages
from stillframe._torch.storable import expose, new_tensor, noted_dtype, plain_tensor, stored_view
from stillframe._torch.tensors import (
    ModelTensors,
    collect_models,
    model_slots,
    stride_bytes,
    torch_dtype,
)
from stillframe.errors import DataLoss, InvalidArgument

MODEL_PART = "model"


@dataclasses.dataclass(frozen=True)
class Weights:
    """A checkpoint's part `model`: tensors by name, other names of tied ones, true dtypes."""

    saved: SavedCheckpoint
    tensors: Mapping[str, SavedTensor]
    aliases: Mapping[str, str]
    notes: Mapping[str, str]
    mapped: MappedPart | None = None

    @classmethod
    def of(cls, saved: SavedCheckpoint, recipe: Any, path_to_map: str | None) -> Weights:
        """Read what the header and the recipe say; with a path, tensors will be that file."""
        tensors = saved.tensors.get(MODEL_PART, {})
        notes = recipe.get("dtypes", {}) if isinstance(recipe, dict) else {}
        if not isinstance(notes, dict) or not notes.keys() <= tensors.keys():
            raise DataLoss("the recipe's dtypes are not of this checkpoint's tensors")
        mapped = None
        if path_to_map is not None and tensors:
            index = next(iter(tensors.values())).part_index
            mapped = MappedPart(path_to_map, saved, index)
        return cls(saved, tensors, saved.aliases(), notes, mapped)

    def canonical(self, name: str) -> str:
        """The name under which a tied tensor is stored."""
        return self.aliases.get(name, name)

    def names(self) -> set[str]:
        """All names, tied ones included."""
        return {*self.tensors, *self.aliases}

    def shape(self, name: str) -> tuple[int, ...]:
        """The true shape of a stored tensor."""
        shape = self.tensors[name].spec.shape
        return shape[:-1] if name in self.notes else shape

    def dtype(self, name: str) -> torch.dtype:
        """The true dtype of a stored tensor."""
        noted = self.notes.get(name)
        return torch_dtype(self.tensors[name].spec.dtype) if noted is None else noted_dtype(noted)

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors that have the true dtypes and shapes, by stored name.

        Raises:
            DataLoss: an extent is damaged; the message names it.
        """
        places = []
        for name, tensor in tensors.items():
            prefer_huge_pages(tensor)
            memory = stored_view(tensor)
            places.append(Place(self.tensors[name], memory.data_ptr(), stride_bytes(memory)))
        self.saved.read(places)

    def take(self, names: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """New tensors by stored name; each of the strides of the one given with it."""
        if self.mapped is not None:
            return {
                name: expose(self.mapped.tensor(self.tensors[name].spec), self.notes.get(name))
                for name in names
            }
        made = {
            name: new_tensor(self.tensors[name].spec, self.notes.get(name), like)
            for name, like in names.items()
        }
        self.read(made)
        return made


def fill_model(model: nn.Module, weights: Weights, what: str) -> None:
    """Give a model that was just made the saved weights, dtypes and ties.

    Raises:
        InvalidArgument: names or shapes differ; all that do are listed.
        DataLoss: an extent is damaged.
    """
    live = collect_models({None: model}, _of_new_model)
    shapes = {name: tuple(tensor.shape) for name, _, _, tensor in model_slots(model)}
    _check_fit(live, shapes, weights, what)
    _tie(model, weights)
    fillable: dict[str, Tensor] = {}
    replaced: dict[str, Tensor] = {}
    for name, _, _, tensor in model_slots(model):
        stored = weights.canonical(name)
        if weights.mapped is None and _can_fill(tensor, weights, stored):
            fillable.setdefault(stored, tensor.detach())
        else:
            replaced.setdefault(stored, tensor)
    fillable = {name: one for name, one in fillable.items() if name not in replaced}
    if fillable:
        weights.read(fillable)
    new = weights.take(dict(replaced))
    objects: dict[str, Tensor] = {}
    for name, module, key, tensor in list(model_slots(model)):
        stored = weights.canonical(name)
        if stored not in new:
            continue
        if tensor.device.type == "cpu":
            # The object stays, and with it whatever else refers to it.
            tensor.data = new[stored]
            continue
        if stored not in objects:
            parameter = isinstance(tensor, nn.Parameter)
            made = new[stored]
            objects[stored] = nn.Parameter(made, tensor.requires_grad) if parameter else made
        setattr(module, key, objects[stored])


def _of_new_model(name: str, tensor: Tensor) -> Tensor:
    # A factory may leave a model on the meta device; its values come from the file.
    if tensor.device.type == "meta":
        return torch.empty(0)
    return plain_tensor(name, tensor)


def _can_fill(tensor: Tensor, weights: Weights, stored: str) -> bool:
    dense = tensor.is_contiguous() or any(
        tensor.is_contiguous(memory_format=one)
        for one, ndim in ((torch.channels_last, 4), (torch.channels_last_3d, 5))
        if tensor.ndim == ndim
    )
    return dense and tensor.device.type == "cpu" and weights.dtype(stored) is tensor.dtype


def _tie(model: nn.Module, weights: Weights) -> None:
    """Make what was one tensor one again, where the model's maker did not."""
    first: dict[str, Tensor] = {}
    for name, module, key, tensor in list(model_slots(model)):
        one = first.setdefault(weights.canonical(name), tensor)
        if one is not tensor:
            setattr(module, key, one)


def _check_fit(
    live: ModelTensors, shapes: Mapping[str, tuple[int, ...]], weights: Weights, what: str
) -> None:
    live_names = {*live.tensors, *live.aliases}
    saved_names = weights.names()
    lines = []
    if missing := sorted(live_names - saved_names):
        lines.append(f"missing in the checkpoint: {', '.join(missing)}")
    if unexpected := sorted(saved_names - live_names):
        lines.append(f"only in the checkpoint: {', '.join(unexpected)}")
    for name in sorted(live_names & saved_names):
        saved_shape = weights.shape(weights.canonical(name))
        if shapes[name] != saved_shape:
            lines.append(
                f"other shape: {name} is {list(shapes[name])}, in the checkpoint "
                f"{list(saved_shape)}"
            )
    for name, first in sorted(live.aliases.items()):
        if name in saved_names and weights.canonical(name) != weights.canonical(first):
            lines.append(f"one tensor in the model, two in the checkpoint: {first}, {name}")
    if lines:
        listed = "\n".join(f"  {line}" for line in lines)
        raise InvalidArgument(
            f"{what} does not fit the model that was made for it; nothing was loaded:\n{listed}"
        )
