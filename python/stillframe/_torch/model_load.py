"""load_model(): a model again, from a saved model or a run's checkpoint."""

from __future__ import annotations

import base64
import io
import os
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillframe._core.address import open_address, part_path
from stillframe._core.saved import Place, SavedCheckpoint
from stillframe._core.state_json import Json, decode
from stillframe._torch.program import ARCHIVE_NAME, PROGRAM_PART, unpack_program
from stillframe._torch.recipe import Factory, apply_notes, maker_of, warn_of_changes, warn_of_torch
from stillframe._torch.skip_init import make_without_values
from stillframe._torch.tensors import bare_model, collect_models
from stillframe._torch.weights import MODEL_PART, Weights, fill_model
from stillframe.errors import DataLoss, InvalidArgument, NotFound


def load_model(
    path: str | os.PathLike[str],
    *,
    factory: Factory | None = None,
    allow: Sequence[str] = ("torch.nn",),
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
    mmap: bool = False,
    allow_pickle: bool = False,
) -> nn.Module:
    """Make a saved model again, in eval mode, every byte of its weights checked.

    Nothing is unpickled, and no module is imported but those that `allow` names. Where the model's
    class or factory is not allowed, or there is none, the torch.export program is taken if one was
    saved.

    Args:
        path: a directory of save_model(); or a run's checkpoint: RUN (its newest), RUN@best,
            RUN@v1.0, RUN@12, RUN@step-1200, or its directory. These need `factory` where the
            Checkpointer was given no `config` for a class that takes arguments.
        factory: makes the model, instead of what was saved; called with the saved config, or
            without it if it takes nothing.
        allow: modules that may be imported, with all that is inside of them.
        device: where to put the model; None: the CPU.
        dtype: of the floating-point tensors; None: as saved.
        mmap: let the weights be the file: nothing is read before it is used, what is written to
            them stays in this process, and they are not checked; verify() does that.
        allow_pickle: load a model that was saved with allow_pickle, or a program that would
            unpickle. They can run any code: only for files that you trust.

    Returns:
        The model, in eval mode. A program's is a GraphModule without train().

    Warns:
        StillframeWarning: torch, or the source of a class by name, is not as it was.

    Raises:
        NotFound: there is no such model, run or checkpoint.
        DataLoss: it is damaged; the message says where.
        InvalidArgument: nothing says how to make the model, or it is not allowed, or not here any
            more; or the weights do not fit: all names and shapes that differ are listed.
    """
    what = os.fspath(path)
    if dtype is not None and not dtype.is_floating_point:
        raise InvalidArgument(f"dtype={dtype} is no floating-point dtype")
    with open_address(path) as saved:
        recipe = saved.state.get("recipe")
        if recipe is not None and not isinstance(recipe, dict):
            raise DataLoss(f"{what}: the recipe is no object")
        if MODEL_PART not in saved.tensors:
            raise NotFound(f"{what} holds no weights of a model (no part `{MODEL_PART}`)")
        to_map = None
        if mmap:
            index = next(i for i, part in enumerate(saved.parts) if part.name == MODEL_PART)
            to_map = part_path(path, saved, index)
        weights = Weights.of(saved, recipe, to_map)
        model = _make(saved, recipe, weights, factory, allow, allow_pickle, what)
    if dtype is not None:
        if isinstance(model, torch.fx.GraphModule):
            raise InvalidArgument(
                f"{what}: a torch.export program has its dtypes built in; pass factory= to load it "
                f"as {dtype}"
            )
        apply: Any = model._apply
        apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
    return model if device is None else model.to(device=device)


def _make(
    saved: SavedCheckpoint,
    recipe: dict[str, Json] | None,
    weights: Weights,
    factory: Factory | None,
    allow: Sequence[str],
    allow_pickle: bool,
    what: str,
) -> nn.Module:
    if factory is None and recipe is not None and "pickle" in recipe:
        if allow_pickle:
            return _finish(_unpickled(recipe["pickle"], what), saved, recipe, weights, what)
        if PROGRAM_PART not in saved.tensors:
            raise InvalidArgument(
                f"{what} was written with allow_pickle=True; a pickle can run any code, so pass "
                "allow_pickle=True only if you trust these files, or factory="
            )
    try:
        maker = maker_of(recipe, factory, allow, what)
    except InvalidArgument:
        if PROGRAM_PART not in saved.tensors:
            raise
        return _program(saved, recipe or {}, weights, allow_pickle, what)
    return _finish(make_without_values(maker), saved, recipe, weights, what)


def _finish(
    model: nn.Module,
    saved: SavedCheckpoint,
    recipe: dict[str, Json] | None,
    weights: Weights,
    what: str,
) -> nn.Module:
    bare = bare_model(model)
    warn_of_changes(recipe, bare, what)
    fill_model(bare, weights, what)
    _set_extra_states(bare, saved, what)
    apply_notes(recipe, bare)
    return model.eval()


def _set_extra_states(model: nn.Module, saved: SavedCheckpoint, what: str) -> None:
    states: Any = saved.state.get("model", {}).get("extra_state", {})
    stateful = collect_models({None: model}, lambda _, tensor: tensor.detach()).stateful
    if stateful.keys() != states.keys():
        raise InvalidArgument(
            f"{what} does not fit the model that was made for it: extra states differ: "
            f"{', '.join(sorted(stateful.keys() ^ states.keys()))}"
        )
    tensors = {name: one for part in saved.tensors.values() for name, one in part.items()}

    def tensor(name: str) -> Tensor:
        if name not in tensors:
            raise DataLoss(f"{what}: an extra state refers to a tensor {name} that is not there")
        from stillframe._torch.storable import new_tensor

        made = new_tensor(tensors[name].spec, None)
        saved.read([Place(tensors[name], made.data_ptr(), None)])
        return made

    for name, module in stateful.items():
        module.set_extra_state(decode(states[name], f"model.{name}", tensor=tensor))


def _program(
    saved: SavedCheckpoint, recipe: dict[str, Json], weights: Weights, allow_pickle: bool, what: str
) -> nn.Module:
    found = saved.tensors[PROGRAM_PART].get(ARCHIVE_NAME)
    if found is None or found.spec.dtype != "U8" or len(found.spec.shape) != 1:
        raise DataLoss(f"{what}: its part {PROGRAM_PART} holds no program")
    archive = torch.empty(found.spec.shape, dtype=torch.uint8)
    saved.read([Place(found, archive.data_ptr(), None)])
    warn_of_torch(recipe, what)
    tensors = weights.take(dict.fromkeys(weights.tensors))
    named = {name: tensors[weights.canonical(name)] for name in weights.names()}
    return unpack_program(archive.numpy().tobytes(), named, allow_pickle=allow_pickle, what=what)


class _WithNewWeights(pickle.Unpickler):
    """Puts an empty tensor where save_model() left one out; ties stay."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._made: dict[str, Tensor] = {}

    def persistent_load(self, pid: Any) -> Any:
        name, is_parameter, requires_grad, shape = pid
        if name not in self._made:
            made = torch.empty(shape, device="meta")
            self._made[name] = nn.Parameter(made, requires_grad) if is_parameter else made
        return self._made[name]


def _unpickled(text: Any, what: str) -> nn.Module:
    try:
        model = _WithNewWeights(io.BytesIO(base64.b64decode(text, validate=True))).load()
    except Exception as error:
        raise InvalidArgument(f"{what}: its pickle cannot be loaded: {error}") from error
    if not isinstance(model, nn.Module):
        raise DataLoss(f"{what}: its pickle is a {type(model).__qualname__}")
    return model
