"""A nested dictionary of tensors and plain values as the content of a checkpoint, and back.

For frameworks that hand over one dictionary instead of models and optimizers. pack() turns it into
what Saver.begin() takes, unpack() gives an equal one with new tensors. Tensors that share their
memory wholly (tied weights) are stored once and come back as one.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from stillframe._core import library
from stillframe._core.layout import PartSpec, TensorSpec
from stillframe._core.saved import SavedCheckpoint
from stillframe._core.saver import Content, Lazy
from stillframe._core.state_json import Encoder, Json, child_path, decode, dumps
from stillframe._torch.live import FORMAT
from stillframe._torch.restore_plan import Targets
from stillframe._torch.tensors import local_tensor, spec_of, stride_bytes
from stillframe.errors import DataLoss, InvalidArgument

_VERSION = attrgetter("_version")
# Above this, whether two trees have the same eager tensors is not looked into.
_COMPARED_BYTES_MAX = 4 * 2**20


@dataclasses.dataclass(frozen=True, slots=True)
class Places:
    """Which part of a checkpoint takes which tensors.

    Attributes:
        own_names: a key of the top level whose tensors are named by the keys below it, nothing in
            front: the model's state_dict, so that its part opens as a plain safetensors file.
        model_part: the part of those.
        parts: the part of other top-level keys; their tensors begin with the part's name.
        rest: the part of all keys that `parts` does not name.
    """

    own_names: str
    model_part: str = "model"
    parts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rest: str = "extra"


@dataclasses.dataclass(slots=True)
class _Entry:
    spec: TensorSpec
    memory: Tensor
    is_lazy: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Fingerprint:
    """Tells whether two trees hold the same tensors, if nothing stepped between them.

    Attributes:
        stored: the stored tensors, and where the lazy ones lie.
        counted: the lazy tensors, kept so that nothing else comes to lie there.
        versions: their version counters.
        eager: the bytes of all other tensors.
    """

    stored: list[tuple[TensorSpec, int | None]]
    counted: list[Tensor]
    versions: list[int]
    eager: bytes

    def matches(self, other: Fingerprint | None) -> bool:
        """Whether the trees hold the same; the counters prove it only between two steps."""
        return (
            other is not None
            and self.stored == other.stored
            and self.versions == other.versions
            and self.eager == other.eager
        )


class Packed:
    """A tree, ready for Saver.begin(); keeps its tensors' memory alive.

    Attributes:
        content: parts, sources, state.json.
        lazy: None if no tensor may be copied later.
        lazy_count: how many may.
    """

    def __init__(
        self,
        parts: Mapping[str, list[_Entry]],
        aliases: Mapping[str, Mapping[str, str]],
        text: str,
        has_pickle: bool,
    ) -> None:
        entries: list[_Entry] = []
        specs = []
        for name, found in parts.items():
            ordered = sorted(found, key=lambda entry: entry.spec.file_order)
            metadata = (FORMAT, *sorted(aliases.get(name, {}).items()))
            specs.append(PartSpec(name, tuple(entry.spec for entry in ordered), metadata))
            entries += ordered
        self._entries = entries
        self._kept: list[object] = []
        sources = (library.Source * len(entries))()
        for source, entry in zip(sources, entries, strict=True):
            source.data = entry.memory.data_ptr()
            source.lazy = entry.is_lazy
            strides = stride_bytes(entry.memory)
            if strides is not None:
                array = (ctypes.c_int64 * len(strides))(*strides)
                self._kept.append(array)
                source.stride_bytes = array
        self.content = Content(specs, sources, text.encode(), has_pickle)
        lazy = [entry for entry in entries if entry.is_lazy]
        # Reading the counter of an inference tensor raises.
        self._counted = [entry for entry in lazy if not entry.memory.is_inference()]
        self._versions = self._versions_now()
        self.lazy_count = len(lazy)
        self.lazy = Lazy([entry.memory for entry in lazy], self._first_changed) if lazy else None

    def fingerprint(self) -> Fingerprint | None:
        """What tells whether a later tree holds the same; None if that would be much to compare."""
        eager = [entry.memory for entry in self._entries if not entry.is_lazy]
        if sum(one.numel() * one.element_size() for one in eager) > _COMPARED_BYTES_MAX:
            return None
        return Fingerprint(
            [(one.spec, one.memory.data_ptr() if one.is_lazy else None) for one in self._entries],
            [entry.memory for entry in self._counted],
            self._versions_now(),
            b"".join(
                one.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                for one in eager
                if one.numel() > 0
            ),
        )

    def _versions_now(self) -> list[int]:
        return [_VERSION(entry.memory) for entry in self._counted]

    def _first_changed(self) -> str | None:
        pairs = zip(self._counted, self._versions, self._versions_now(), strict=True)
        return next((entry.spec.name for entry, old, new in pairs if old != new), None)


def pack(
    tree: Mapping[str, Any],
    places: Places,
    *,
    is_lazy: Callable[[Tensor], bool],
    about: Mapping[str, Any],
    allow_pickle: bool = False,
) -> Packed:
    """Turn a tree into the content of a save.

    Args:
        tree: text keys at the top; below them what state.json can hold, and tensors.
        places: which part takes which tensors.
        is_lazy: whether training writes a tensor only behind the fence.
        about: plain values that go beside the tree.
        allow_pickle: pickle values that have no form in state.json.

    Raises:
        InvalidArgument: a value or tensor has no form in a checkpoint; the message has its path.
    """
    packer = _Packer(is_lazy, places.model_part)
    encoder = Encoder(packer.lift, allow_pickle=allow_pickle)
    members: dict[str, Json] = {}
    versions: dict[str, Json] = {}
    # The model first: what others share with it is stored in its part, under its name.
    for key in sorted(tree, key=lambda key: key != places.own_names):
        if not isinstance(key, str) or key.startswith("$"):
            raise InvalidArgument(f"the key {key!r} must be a text that does not begin with $")
        value = tree[key]
        if key == places.own_names and _has_names(value):
            packer.part = places.model_part
            names = {name: encoder.encode(item, name) for name, item in value.items()}
            is_ordered = isinstance(value, collections.OrderedDict)
            members[key] = {"$ordered": list(names.items())} if is_ordered else names
            # Module.load_state_dict() looks up the versions of the modules in it.
            versions[key] = encoder.encode(getattr(value, "_metadata", None), f"{key}._metadata")
            continue
        packer.part = places.parts.get(key, places.rest)
        path = packer.part if key in places.parts else child_path(packer.part, key)
        members[key] = encoder.encode(value, path)
    document = {
        "format_version": 1,
        "tree": {key: members[key] for key in tree},
        "about": {**encoder.encode(dict(about), "about"), "versions": versions},
    }
    aliases = {places.model_part: packer.model_aliases}
    return Packed(packer.parts, aliases, dumps(document), encoder.has_pickle)


def unpack(
    saved: SavedCheckpoint, state: Mapping[str, Any] | None = None, *, allow_pickle: bool = False
) -> dict[str, Any]:
    """The tree that pack() was given, with new CPU tensors that own their memory.

    Args:
        saved: the checkpoint.
        state: another state.json for the same tensors; None takes the checkpoint's own.
        allow_pickle: load pickles. They can run any code: only for files that you trust.

    Raises:
        DataLoss: damaged, or no tree.
        InvalidArgument: it holds a pickle, and `allow_pickle` is not set.
    """
    state = saved.state if state is None else state
    if "tree" not in state:
        raise DataLoss("state.json has no tree: this checkpoint comes from another interface")
    targets = Targets(saved)
    options: dict[str, Any] = {"tensor": targets.add_new, "allow_pickle": allow_pickle}
    tree = decode(state["tree"], "checkpoint", **options)
    versions = decode(state.get("about", {}).get("versions", {}), "about.versions", **options)
    if not isinstance(tree, dict):
        raise DataLoss("state.json: the tree is not a dictionary")
    saved.read(targets.places)
    targets.finish()
    for key, metadata in versions.items():
        if metadata is not None and isinstance(tree.get(key), collections.OrderedDict):
            tree[key]._metadata = metadata
    return tree


def _has_names(value: Any) -> bool:
    return type(value) in (dict, collections.OrderedDict) and all(
        isinstance(name, str) and name and not name.startswith("$") for name in value
    )


class _Packer:
    """Gives each tensor of the tree its part and its name."""

    def __init__(self, is_lazy: Callable[[Tensor], bool], model_part: str) -> None:
        self.part = ""
        self.parts: dict[str, list[_Entry]] = {}
        self.model_aliases: dict[str, str] = {}
        self._model_part = model_part
        self._is_lazy = is_lazy
        self._by_memory: dict[tuple[object, ...], str] = {}
        self._names: set[str] = set()

    def lift(self, path: str, tensor: Tensor) -> str:
        """Take the tensor in; return the name under which a part holds it."""
        memory = local_tensor(path, tensor).detach()
        place = (memory.data_ptr(), memory.dtype, memory.shape, memory.stride())
        known = self._by_memory.get(place) if memory.numel() > 0 else None
        if known is not None:
            if self.part == self._model_part and path not in self._names:
                self.model_aliases[path] = known
            return known
        # No two parts may share a name: other readers merge all files of a directory.
        name = next(one for one in _candidates(path) if one not in self._names)
        self._names.add(name)
        self._by_memory[place] = name
        entry = _Entry(spec_of(name, memory), memory, self._is_lazy(memory))
        self.parts.setdefault(self.part, []).append(entry)
        return name


def _candidates(name: str) -> Iterator[str]:
    yield name
    for count in itertools.count(2):
        yield f"{name}#{count}"
