"""Pairing the tensors of models, and of modules beside them, with those of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from stillframe._core.saved import SavedCheckpoint, SavedTensor
from stillframe._torch.restore_plan import Problems, Targets
from stillframe._torch.tensors import ModelTensors
from stillframe.errors import InvalidArgument

MapNames = Mapping[str, str] | Callable[[str], str | None] | None


def plan_model(
    saved: SavedCheckpoint,
    models: ModelTensors,
    mapped: dict[str, str],
    is_whole: bool,
    prefixes: tuple[str, ...],
    targets: Targets,
    problems: Problems,
) -> None:
    """Pair the models' tensors with the checkpoint's.

    Args:
        saved: the checkpoint.
        models: what is to be filled.
        mapped: from mapped_names().
        is_whole: all of it; else only names that begin with one of `prefixes`.
        prefixes: see `is_whole`.
        targets: takes the pairs.
        problems: takes what differs.

    Raises:
        InvalidArgument: the prefixes select nothing.
    """

    def is_selected(name: str) -> bool:
        return is_whole or (bool(prefixes) and name.startswith(prefixes))

    aliases = saved.aliases("model")
    sources: dict[str, SavedTensor] = {}
    unknown = []
    owners: dict[str, list[str]] = {}
    for alias, owner in aliases.items():
        if alias in mapped:
            owners.setdefault(owner, []).append(mapped[alias])
    for saved_name, tensor in saved.tensors.get("model", {}).items():
        names = [mapped[saved_name]] if saved_name in mapped else []
        names += owners.get(saved_name, [])
        known = [
            models.canonical(name) for name in names if models.canonical(name) in models.tensors
        ]
        for name in known:
            sources.setdefault(name, tensor)
        if names and not known and any(map(is_selected, names)):
            unknown.append(saved_name)
    problems.unknown(unknown)
    selected = [name for name in models.tensors if is_selected(name)]
    if prefixes and not is_whole and not selected:
        raise InvalidArgument(f"only={list(prefixes)} selects none of the model's tensors")
    _pair(selected, models, sources, targets, problems)


def plan_ema(
    saved: SavedCheckpoint, ema: ModelTensors, targets: Targets, problems: Problems
) -> None:
    """Pair the tensors of modules beside the models; names are not mapped."""
    tensors = saved.tensors.get("ema", {})
    if not ema.tensors:
        if tensors:
            problems.unknown(["ema (pass ema=, or leave it out by only=)"])
        return
    sources = {ema.canonical(name): tensor for name, tensor in tensors.items()}
    for alias, owner in saved.aliases("ema").items():
        sources.setdefault(ema.canonical(alias), tensors[owner])
    problems.unknown([name for name in tensors if ema.canonical(name) not in ema.tensors])
    _pair(list(ema.tensors), ema, sources, targets, problems)


def _pair(
    names: list[str],
    live: ModelTensors,
    sources: Mapping[str, SavedTensor],
    targets: Targets,
    problems: Problems,
) -> None:
    for name in names:
        source = sources.get(name)
        if source is None:
            problems.missing([name])
        elif problems.fits(name, source.spec, live.tensors[name]):
            targets.add(source, name, live.tensors[name])


def mapped_names(
    saved: SavedCheckpoint, models: ModelTensors, map_names: MapNames
) -> dict[str, str]:
    """The checkpoint's model names, tied ones included, and what the model calls them."""
    names = [*saved.tensors.get("model", {}), *saved.aliases("model")]
    if map_names is None:
        return {name: name for name in names}
    mapped = {}
    for name in names:
        new = map_names.get(name, name) if isinstance(map_names, Mapping) else map_names(name)
        if new is not None:
            mapped[name] = new
    return mapped
