"""The recipe: how a model is made again from its state, without pickle.

A recipe is the member `recipe` of state.json (docs/FORMAT.md section 5). It names an importable
class or factory and its arguments, or describes a model of torch's own modules; and it says under
which versions, and from which source, so that a change since then can be told.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import platform
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import stillframe
from stillframe._core.state_json import Encoder, Json, decode
from stillframe._core.warn import warn
from stillframe._torch import structure
from stillframe._torch.structure import NotDescribable
from stillframe._torch.tensors import bare_model
from stillframe.errors import DataLoss, InvalidArgument

Factory = Callable[..., nn.Module]


# --- Saving --------------------------------------------------------------------------------------


def make_recipe(
    model: nn.Module,
    config: Mapping[str, Any] | None = None,
    factory: Factory | str | None = None,
) -> Json:
    """The recipe of a bare model.

    Args:
        model: the model.
        config: keyword arguments of its class or factory, plain values.
        factory: an importable function, or "module:name" of one.

    Raises:
        NotDescribable: neither was given, and the model's class alone does not say how it is made.
        InvalidArgument: the config has a value without a form, or the factory cannot be imported.
    """
    recipe: dict[str, Json] = {"versions": _versions(), "sources": {}}
    if factory is not None:
        recipe["factory"] = factory if isinstance(factory, str) else _importable_name(factory)
        _split_name(recipe["factory"])
        if not isinstance(factory, str):
            _note_source(recipe["sources"], factory)
    elif config is not None or (
        not _is_torch(type(model)) and not list(_parameters_of(type(model)))
    ):
        # A class without arguments is made in one way only.
        recipe["class"] = _name_of(type(model))
    else:
        recipe["structure"] = structure.describe(model)
    if "structure" not in recipe:
        recipe["config"] = Encoder(_no_tensor).encode(dict(config or {}), "config")
    for kind in {type(module): None for module in model.modules()}:
        if not _is_torch(kind):
            _note_source(recipe["sources"], kind)
    return recipe


def checkpoint_recipe(
    model: nn.Module,
    config: Mapping[str, Any] | None = None,
    factory: Factory | str | None = None,
) -> Json | None:
    """The member `recipe` for a run's state.json, so that load_model(RUN) needs no factory=.

    Args:
        model: the model of the run, wrapped or not.
        config: as for save_model(); None if the user gave none.
        factory: the same.

    Returns:
        The recipe; None when the model does not say how it is made, which is no error.

    Raises:
        InvalidArgument: what the user gave cannot be a recipe.
    """
    bare = bare_model(model)
    try:
        recipe = make_recipe(bare, config, factory)
    except NotDescribable:
        return None
    note_recipe(recipe, bare)
    return recipe


def recipe_maker(
    models: Mapping[str | None, nn.Module],
    config: Mapping[str, Any] | None,
    factory: Factory | str | None,
) -> Callable[[], Json | None]:
    """What makes the recipe of a Checkpointer's model when it is called; tried out once.

    Raises:
        InvalidArgument: what the user gave cannot be a recipe, or there are several models.
    """
    model = models.get(None)
    if model is None:
        if config is not None or factory is not None:
            raise InvalidArgument("config= and factory= are of one model, and model= is a dict")
        return lambda: None
    if config is not None or factory is not None:
        checkpoint_recipe(model, config, factory)
    return lambda: checkpoint_recipe(model, config, factory)


def note_recipe(recipe: Json, model: nn.Module) -> None:
    """Put in what the stored tensors do not say: the frozen ones, and the dtypes of other buffers.

    A buffer that is no state is made by the constructor, but half() or to() has changed it since.
    """
    frozen = [name for name, one in model.named_parameters() if not one.requires_grad]
    if frozen:
        recipe["frozen"] = frozen
    dtypes = {
        name: str(buffer.dtype).removeprefix("torch.") for name, buffer in _other_buffers(model)
    }
    if dtypes:
        recipe["other_buffers"] = dtypes


def apply_notes(recipe: Json | None, model: nn.Module) -> None:
    """What note_recipe() noted, to a model that was made again."""
    if not isinstance(recipe, dict):
        return
    frozen = set(recipe.get("frozen", ()))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in frozen:
            parameter.requires_grad_(False)
    dtypes = recipe.get("other_buffers", {})
    for name, buffer in list(_other_buffers(model)):
        dtype = getattr(torch, str(dtypes.get(name)), None)
        if isinstance(dtype, torch.dtype) and dtype is not buffer.dtype:
            buffer.data = buffer.data.to(dtype)


def _other_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for key in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers.get(key)
            if buffer is not None and buffer.is_floating_point():
                yield f"{prefix}.{key}".strip("."), buffer


def _versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "stillframe": stillframe.__version__,
    }


def _is_torch(kind: type) -> bool:
    return kind.__module__.split(".", 1)[0] == "torch"


def _parameters_of(kind: type) -> Iterator[inspect.Parameter]:
    # Module's own constructor takes anything and uses nothing.
    if kind.__init__ is nn.Module.__init__:  # type: ignore[misc]
        return
    yield from inspect.signature(kind).parameters.values()


def _name_of(thing: Any) -> str:
    return f"{thing.__module__}:{thing.__qualname__}"


def _importable_name(factory: Factory) -> str:
    name = _name_of(factory)
    module = sys.modules.get(factory.__module__)
    found: Any = module
    for step in factory.__qualname__.split("."):
        found = getattr(found, step, None)
    if found is not factory:
        raise InvalidArgument(
            f"factory= {name} cannot be imported by its name; pass a function or class at the top "
            'of a module, or "module:name" of one'
        )
    return name


def _note_source(sources: dict[str, Json], thing: Any) -> None:
    digest = _source_hash(thing)
    if digest is not None:
        sources[_name_of(thing)] = digest


def _source_hash(thing: Any) -> str | None:
    """SHA-256 of the source of a class, its own bases included, or of a function."""
    things = [thing]
    if isinstance(thing, type):
        things = [one for one in thing.__mro__ if not _is_torch(one) and one is not object]
    digest = hashlib.sha256()
    for one in things:
        try:
            digest.update(inspect.getsource(one).encode())
        except (OSError, TypeError):
            if one is thing:
                return None
    return digest.hexdigest()


def _no_tensor(path: str, tensor: Tensor) -> str:
    raise InvalidArgument(f"{path} is a tensor; a config holds plain values")


# --- Loading -------------------------------------------------------------------------------------


def maker_of(
    recipe: Json | None, factory: Factory | None, allow: Sequence[str], what: str
) -> Callable[[], nn.Module]:
    """What makes the model: the given factory, or what the recipe names, imported now.

    Raises:
        InvalidArgument: there is neither, or the recipe names what `allow` does not, or what is
            not there any more; the message says what to do.
        DataLoss: the recipe is none.
    """
    recipe = {} if recipe is None else recipe
    if not isinstance(recipe, dict):
        raise DataLoss(f"{what}: the recipe is no object")
    config = decode(recipe.get("config", {}), "config", tensor=_no_tensor_back)
    if factory is not None:
        return _call_of(factory, config, what)
    if "structure" in recipe:
        if not is_allowed("torch.nn", allow):
            raise InvalidArgument(f"{what} is made of torch.nn, which is not in allow={allow!r}")
        return lambda: structure.build(recipe["structure"])
    name = recipe.get("class") or recipe.get("factory")
    if name is None:
        raise InvalidArgument(
            f"{what} does not say how its model is made; pass factory=, a class or function that "
            "makes it"
        )
    return _call_of(import_name(name, allow, what), config, what)


def is_allowed(module: str, allow: Sequence[str]) -> bool:
    """Whether a module is one of `allow`, or inside of one."""
    return any(module == one or module.startswith(f"{one}.") for one in allow)


def import_name(name: str, allow: Sequence[str], what: str) -> Factory:
    """Import the class or function that a recipe names, if `allow` names its module.

    Raises:
        InvalidArgument: it is not allowed, or not there.
    """
    module_name, steps = _split_name(name)
    if module_name == "__main__":
        raise InvalidArgument(
            f"{what} was written by a script that defines {steps[-1]} itself; pass "
            f"factory={steps[-1]}"
        )
    if not is_allowed(module_name, allow):
        raise InvalidArgument(
            f"{what} is made by {name}, and loading it would import and run {module_name}; if you "
            f"trust that, pass allow={(*allow, module_name)!r}, or factory="
        )
    try:
        found: Any = importlib.import_module(module_name)
        for step in steps:
            found = getattr(found, step)
            # A module's import of another one is no way around `allow`.
            if isinstance(found, types.ModuleType):
                raise AttributeError(f"{step} is a module")
    except (ImportError, AttributeError) as error:
        raise InvalidArgument(
            f"{what} is made by {name}, which is not here any more ({error}); install or restore "
            "it, or pass factory="
        ) from error
    home = getattr(found, "__module__", None)
    is_model = isinstance(found, type) and issubclass(found, nn.Module)
    is_function = isinstance(found, types.FunctionType) and not str(home).startswith("torch.")
    if not (is_model or is_function) or not is_allowed(str(home), allow):
        raise InvalidArgument(
            f"{what}: {name} comes from {home}, and is no model or function of a module in "
            f"allow={tuple(allow)!r}"
        )
    return found  # type: ignore[no-any-return]


def _split_name(name: Any) -> tuple[str, list[str]]:
    module, colon, qualified = name.partition(":") if isinstance(name, str) else ("", "", "")
    steps = qualified.split(".")
    if not colon or not all(one.isidentifier() for one in [*module.split("."), *steps]):
        raise InvalidArgument(f'{name!r} is not of the form "module:name", importable both')
    return module, steps


def _call_of(factory: Factory, config: Any, what: str) -> Callable[[], nn.Module]:
    if not callable(factory):
        raise InvalidArgument("factory= must be a class or a function that returns the model")
    if not isinstance(config, dict):
        raise DataLoss(f"{what}: the recipe's config is no object")

    def call() -> nn.Module:
        arguments = config
        try:
            inspect.signature(factory).bind(**config)
        except TypeError as error:
            # A factory that needs nothing, such as `lambda: Net(3)`, knows the config itself.
            if not config or not _takes_nothing(factory):
                raise InvalidArgument(
                    f"{what}: its maker does not take the recorded config {sorted(config)}: "
                    f"{error}; pass factory=, a function of these arguments or of none"
                ) from error
            arguments = {}
        except ValueError:
            pass  # No signature to ask.
        model = factory(**arguments)
        if not isinstance(model, nn.Module):
            raise InvalidArgument(f"{what}: its maker returned a {type(model).__qualname__}")
        return model

    return call


def _takes_nothing(factory: Factory) -> bool:
    try:
        inspect.signature(factory).bind()
    except TypeError:
        return False
    return True


def warn_of_changes(recipe: Json | None, model: nn.Module, what: str) -> None:
    """Warn, by name, of what is not as it was when the recipe was made."""
    if not isinstance(recipe, dict):
        return
    warn_of_torch(recipe, what)
    sources = recipe.get("sources", {})
    here: dict[str, str] = {}
    for kind in {type(module) for module in model.modules() if not _is_torch(type(module))}:
        digest = _source_hash(kind)
        if digest is not None:
            here[_name_of(kind)] = digest
            # What a script defines has another module's name once it is imported.
            here.setdefault(f"__main__:{kind.__qualname__}", digest)
    factory = recipe.get("factory")
    if isinstance(factory, str) and factory in sources:
        module_name, steps = _split_name(factory)
        found: Any = sys.modules.get(module_name)
        for step in steps:
            found = getattr(found, step, None)
        if found is not None and (digest := _source_hash(found)) is not None:
            here[factory] = digest
    changed = sorted(name for name, digest in sources.items() if here.get(name, digest) != digest)
    if changed:
        warn(
            f"{what}: the source of {', '.join(changed)} has changed since it was written; check "
            "that the model still computes the same"
        )


def warn_of_torch(recipe: Json, what: str) -> None:
    """Warn when the model was saved by another torch."""
    written = recipe.get("versions", {}).get("torch")
    if written is not None and written != torch.__version__:
        warn(f"{what} was written by torch {written}; this is torch {torch.__version__}")


def _no_tensor_back(name: str) -> Tensor:
    raise DataLoss(f"a config refers to a tensor {name}")
