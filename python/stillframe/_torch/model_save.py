"""save_model(): weights, and how to make the model again."""

from __future__ import annotations

import base64
import io
import os
import pickle
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stillframe._core.state_json import Encoder, Json, dumps
from stillframe._torch.program import ARCHIVE_NAME, PROGRAM_PART, export_program, pack_program
from stillframe._torch.recipe import Factory, make_recipe, note_recipe
from stillframe._torch.storable import plain_tensor, true_dtype
from stillframe._torch.structure import NotDescribable
from stillframe._torch.tensors import ModelTensors, bare_model, collect_models
from stillframe._torch.weights import MODEL_PART
from stillframe._torch.write import Part, write_model
from stillframe.errors import InvalidArgument

_FORMAT = ("format", "pt")


def save_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    factory: Factory | str | None = None,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    allow_pickle: bool = False,
) -> None:
    """Save a whole model: its weights, and how it is made again, without pickle.

    The result is a directory: model.safetensors, which every safetensors reader opens, a manifest
    with hashes of every byte, and state.json with the recipe. `stillframe show` and `verify` take
    it, load_model() makes the model again. A saved model that is there already is replaced at once;
    what is under `path` is complete whatever happens, and durable when this returns.

    What makes the model again, first that fits:
      - `factory`, called with `config`;
      - the model's class, called with `config`, or with nothing if it takes nothing;
      - its structure, if all its modules are torch's own, such as a Sequential of layers;
      - besides, with `example_inputs`, a torch.export program: for inference, needs no source.

    Args:
        model: the model, also one inside of torch.compile or DDP; not changed.
        path: a directory to make; parents are made too.
        config: keyword arguments for the class or factory: plain values.
        factory: a function or class that makes the model, importable, or "module:name" of one.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        dynamic_shapes: for example_inputs, as torch.export.export() takes it.
        allow_pickle: pickle the model's object (without its weights) where nothing else makes it.
            Whoever loads it must allow it too.

    Raises:
        InvalidArgument: nothing says how to make the model; or a tensor cannot be stored, such as
            one on the meta device or a quantised one; or `path` is something else than a saved
            model. All of them before anything is written.
        ResourceExhausted: the disk is full; what was there is as it was.
        DataLoss: another thread changed the weights meanwhile.
        Unavailable: the drive failed, or libstillframe.so is missing.
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgument(f"save_model() takes an nn.Module, not a {type(model).__qualname__}")
    bare = bare_model(model)
    found = collect_models({None: bare}, plain_tensor)
    recipe, has_pickle = _recipe(
        bare, found, config, factory, has_program=example_inputs is not None, may=allow_pickle
    )
    note_recipe(recipe, bare)
    dtypes = {name: noted for name, one in found.tensors.items() if (noted := true_dtype(one))}
    if dtypes:
        recipe["dtypes"] = dtypes

    stored = {name: plain_tensor(name, one) for name, one in found.tensors.items()}
    metadata = [_FORMAT, *sorted(found.aliases.items())]
    parts = [Part(MODEL_PART, stored, metadata)]
    if example_inputs is not None:
        program = export_program(bare, example_inputs, dynamic_shapes)
        archive = pack_program(program, {*found.tensors, *found.aliases})
        parts.append(Part(PROGRAM_PART, {ARCHIVE_NAME: archive}, [_FORMAT]))

    document: Json = {"format_version": 1}
    if found.stateful:
        encoder = Encoder(_no_tensor, allow_pickle=allow_pickle)
        document["model"] = {
            "extra_state": {
                name: encoder.encode(module.get_extra_state(), f"model.{name}")
                for name, module in found.stateful.items()
            }
        }
        has_pickle |= encoder.has_pickle
    document["recipe"] = recipe
    write_model(
        os.path.realpath(os.fspath(path)), parts, dumps(document).encode(), has_pickle=has_pickle
    )


def _recipe(
    bare: nn.Module,
    found: ModelTensors,
    config: Mapping[str, Any] | None,
    factory: Factory | str | None,
    *,
    has_program: bool,
    may: bool,
) -> tuple[dict[str, Json], bool]:
    try:
        return make_recipe(bare, config, factory), False
    except NotDescribable as error:
        recipe = make_recipe(bare, {})
        del recipe["class"], recipe["config"]
        if may:
            recipe["pickle"] = _pickled(bare, found)
            return recipe, True
        if has_program:
            return recipe, False
        raise InvalidArgument(
            f"{error}: it does not say how it is made; give config=, the keyword arguments of "
            f"{type(bare).__qualname__}, or factory=, a function that makes it, or example_inputs= "
            "for inference alone"
        ) from error


class _WithoutWeights(pickle.Pickler):
    """Leaves the tensors out that are stored by name."""

    def __init__(self, file: io.BytesIO, names: Mapping[int, str]) -> None:
        super().__init__(file)
        self._names = names

    def persistent_id(self, obj: Any) -> Any:
        name = self._names.get(id(obj)) if isinstance(obj, Tensor) else None
        if name is None:
            return None
        return name, isinstance(obj, nn.Parameter), obj.requires_grad, tuple(obj.shape)


def _pickled(bare: nn.Module, found: ModelTensors) -> str:
    buffer = io.BytesIO()
    try:
        _WithoutWeights(buffer, found.names).dump(bare)
    except Exception as error:
        raise InvalidArgument(f"the model cannot be pickled: {error}") from error
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _no_tensor(path: str, tensor: Tensor) -> str:
    raise InvalidArgument(
        f"{path} is a tensor in an extra state; keep it in a buffer, which save_model() stores"
    )
