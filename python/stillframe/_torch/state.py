"""state.json of one save: what is not a tensor, and the tensors that such state holds."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from stillframe._core.state_json import Encoder, dumps
from stillframe._torch.live import LiveState
from stillframe._torch.members import Members, member_path
from stillframe._torch.rng import encode_rng
from stillframe._torch.tensors import local_tensor


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedState:
    """One state.json.

    Attributes:
        text: UTF-8.
        lifted: the tensors that it names beside those of the layout, by their names: copied before
            save() returns.
        has_pickle: whether a pickle is in it.
    """

    text: bytes
    lifted: list[tuple[str, Tensor]]
    has_pickle: bool


def encode_state(
    members: Members,
    live: LiveState,
    optimizer_text: str,
    *,
    recipe_text: str,
    extra: Any,
    epoch: int | None,
    allow_pickle: bool,
) -> EncodedState:
    """Ask every member for its state, and encode it with the random number generators'.

    Args:
        members: what is saved.
        live: its tensors.
        optimizer_text: the JSON of the optimizers, as `live` gives it.
        recipe_text: the JSON of how the model is made again; empty: nobody knows.
        extra: as given to save().
        epoch: as given to step().
        allow_pickle: pickle what has no other form.

    Raises:
        InvalidArgument: a value has no form; the message has its path.
    """
    lifted: list[tuple[str, Tensor]] = []

    def lift(path: str, tensor: Tensor) -> str:
        memory = local_tensor(path, tensor.detach())
        known = live.lazy_name(memory)
        if known is not None:
            return known
        name = _extra_name(path)
        lifted.append((name, memory))
        return name

    encoder = Encoder(lift, allow_pickle=allow_pickle)
    document = ['"format_version": 1', f'"named": {dumps(list(members.named))}']
    if live.models.stateful:
        states = {
            name: encoder.encode(_plain(module.get_extra_state()), f"model.{name}")
            for name, module in live.models.stateful.items()
        }
        document.append(f'"model": {dumps({"extra_state": states})}')
    if members.optimizers:
        document.append(f'"optimizer": {optimizer_text}')
    for section, objects in members.stateful.items():
        encoded = {
            name: encoder.encode(_plain(one.state_dict()), member_path(section, name))
            for name, one in objects.items()
        }
        document.append(f'"{section}": {dumps(encoded.get(None, encoded))}')
    if recipe_text:
        document.append(f'"recipe": {recipe_text}')
    if extra is not None:
        document.append(f'"extra": {dumps(encoder.encode(extra, "extra"))}')
    if epoch is not None:
        document.append(f'"epoch": {epoch}')
    # After all that may draw from them.
    document.append(f'"rng": {encode_rng()}')
    text = f"{{{', '.join(document)}}}\n".encode()
    return EncodedState(text, lifted, encoder.has_pickle or live.has_pickle)


def _extra_name(path: str) -> str:
    """The tensor name for a path in `extra`, or in another part of the state, which gets a `$`."""
    if not path.startswith("extra"):
        return f"extra.${path}"
    rest = path.removeprefix("extra")
    return f"extra{rest}" if rest.startswith(".") else f"extra.{rest}"


def _plain(value: Any) -> Any:
    """The same with OrderedDict, Counter and their like as the dicts that they are."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) is list:
        return [_plain(item) for item in value]
    return value
