"""save() and load(): one file for dictionaries of tensors and plain values.

The file is a plain safetensors file. Tensors lie in it under the names that lead to them; what is
not a tensor is typed JSON in the header's metadata, beside the hashes of the file's own extents
(docs/FORMAT.md section 9).
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

import torch
from torch import Tensor, nn

from stillframe._core.saved import Place, SavedCheckpoint
from stillframe._core.state_json import Encoder, Json, decode, dumps
from stillframe._torch.memory import MappedPart, prefer_huge_pages
from stillframe._torch.storable import expose, new_tensor, plain_tensor, stored_view, true_dtype
from stillframe._torch.tensors import stride_bytes
from stillframe._torch.write import Part, write_file
from stillframe.errors import DataLoss, InvalidArgument, NotFound

_STATE_KEY = "stillframe.state"
_TENSOR_NAME_BYTES_MAX = 4096
# The pieces of a path as child_path() makes it.
_STEP = re.compile(r'\.([^\W\d]\w*)|\[("(?:[^"\\]|\\.)*")\]|\[(\d+)\]')
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def save(obj: Any, path: str | os.PathLike[str]) -> None:
    """Save tensors and plain values to one file, as torch.save() does for them, without pickle.

    Takes dicts (with any plain keys), lists, tuples, sets, None, bool, int, float, str, bytes,
    NumPy scalars and small arrays, torch.Size, torch.dtype, torch.device and tensors of any shape,
    strides and device. Tensors that are the same memory stay so; a Parameter stays one. The file
    is replaced at once: under `path` is the old one or the new one whatever happens, and the new
    one survives a power cut when this returns. safetensors opens it.

    Args:
        obj: what to save, such as model.state_dict().
        path: of the file; its directory must exist. A link is followed.

    Raises:
        InvalidArgument: a value has no form; the message has its path. Or `path` is no regular
            file.
        NotFound: there is no such directory.
        ResourceExhausted: the disk is full; the old file is as it was.
        DataLoss: another thread changed a tensor meanwhile.
        Unavailable: the drive failed, or libstillframe.so is missing.
    """
    collected = _Collected()
    value = Encoder(collected.lift).encode(obj, "")
    document: Json = {"format_version": 1, "value": value}
    if collected.notes:
        document["tensors"] = collected.notes
    metadata = [("format", "pt"), (_STATE_KEY, dumps(document))]
    write_file(os.path.realpath(os.fspath(path)), Part("file", collected.stored, metadata))


def load(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | int | None = None,
    mmap: bool = False,
) -> Any:
    """Load what save() wrote, every byte checked; or any other safetensors file, as a dict.

    Args:
        path: of the file.
        device: where the tensors are to be; None: the CPU, wherever they were.
        mmap: let the tensors be the file: nothing is read before it is used, what is written to
            them stays in this process, and nothing but the header is checked; verify() does that.

    Returns:
        An object equal to what was saved, its tensors new; of another writer's file a dict of its
        tensors by name.

    Raises:
        NotFound: no such file.
        DataLoss: it is damaged or truncated; the message says where.
        InvalidArgument: it is a file of torch.save().
    """
    real = os.path.realpath(os.fspath(path))
    with _open(real) as saved:
        part = saved.parts[0]
        state = dict(part.metadata).get(_STATE_KEY)
        document = None if state is None else _read_document(state)
        notes: dict[str, Any] = {} if document is None else document.get("tensors", {})
        tensors = _mapped(saved, real, notes) if mmap else _read(saved, notes)
    if device is not None:
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    for name, note in notes.items():
        tensors[name] = _dress(tensors[name], note)
    if document is None:
        return tensors

    def tensor(name: str) -> Tensor:
        if name not in tensors:
            raise DataLoss(f"{path} refers to a tensor {name} that it does not hold")
        return tensors[name]

    return decode(document["value"], "", tensor=tensor)


def verify(path: str | os.PathLike[str]) -> None:
    """Read a file of save(), a saved model or a checkpoint, and compare every hash.

    Args:
        path: a file, a directory of save_model(), or a checkpoint: RUN, RUN@best, RUN@12.

    Raises:
        NotFound: there is none.
        DataLoss: a byte is not what was saved; the message says where.
        InvalidArgument: another writer's file, which has no hashes.
    """
    real = os.path.realpath(os.fspath(path))
    if os.path.isfile(real):
        with _open(real) as saved:
            saved.verify()
        return
    from stillframe._core.address import open_address

    with open_address(path) as saved:
        saved.verify()


class _Collected:
    """The tensors that an Encoder met, each memory once, under names of their own."""

    def __init__(self) -> None:
        self.stored: dict[str, Tensor] = {}
        self.notes: dict[str, dict[str, Any]] = {}
        self._names: dict[tuple[object, ...], str] = {}
        # While an object is known by its id(), it must live.
        self._kept: list[Tensor] = []

    def lift(self, path: str, tensor: Tensor) -> str:
        """Take a tensor and return its name."""
        name = _name_of(path)
        stored = plain_tensor(path.removeprefix(".") or "the object", tensor)
        is_parameter = isinstance(tensor, nn.Parameter)
        key: tuple[object, ...] = (
            stored.data_ptr() if stored.numel() else id(tensor),
            tensor.dtype,
            stored.shape,
            stored.stride(),
            stored.device,
            is_parameter,
            tensor.requires_grad,
        )
        known = self._names.get(key)
        if known is not None:
            return known
        self._kept.append(tensor)
        name = self._unused(name)
        self._names[key] = name
        self.stored[name] = stored
        note: dict[str, Any] = {}
        if (dtype := true_dtype(tensor)) is not None:
            note["dtype"] = dtype
        if is_parameter:
            note["parameter"] = True
        if tensor.requires_grad:
            note["requires_grad"] = True
        if note:
            self.notes[name] = note
        return name

    def _unused(self, name: str) -> str:
        valid = 0 < len(name.encode()) <= _TENSOR_NAME_BYTES_MAX and not _CONTROL.search(name)
        if not valid or name == "__metadata__":
            name = f"#{len(self.stored)}"
        if name not in self.stored:
            return name
        return next(
            candidate
            for number in range(2, len(self.stored) + 3)
            if (candidate := f"{name}#{number}") not in self.stored
        )


def _name_of(path: str) -> str:
    """`.model["layer.0.weight"][3]` becomes `model.layer.0.weight.3`."""
    steps = []
    at = 0
    while at < len(path):
        step = _STEP.match(path, at)
        if step is None:
            return ""
        identifier, quoted, index = step.groups()
        steps.append(json.loads(quoted) if quoted else identifier or index)
        at = step.end()
    return ".".join(steps)


def _open(path: str) -> SavedCheckpoint:
    try:
        with open(path, "rb") as file:
            magic = file.read(2)
    except IsADirectoryError:
        raise InvalidArgument(f"{path} is a directory; load_model() loads whole models") from None
    except FileNotFoundError:
        raise NotFound(f"{path}: no such file") from None
    if magic in (b"PK", b"\x80\x02"):
        raise InvalidArgument(
            f"{path} is a file of torch.save(), which holds a pickle; read it by torch.load() and "
            "save it again by stillframe.torch.save()"
        )
    return SavedCheckpoint.of_file(path)


def _read_document(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataLoss(f"{_STATE_KEY} is not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format_version") != 1:
        raise DataLoss(f"{_STATE_KEY} is not of this version")
    return document


def _read(saved: SavedCheckpoint, notes: dict[str, Any]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    places = []
    for name, one in saved.tensors[saved.parts[0].name].items():
        tensor = new_tensor(one.spec, notes.get(name, {}).get("dtype"))
        prefer_huge_pages(tensor)
        memory = stored_view(tensor)
        places.append(Place(one, memory.data_ptr(), stride_bytes(memory)))
        tensors[name] = tensor
    saved.read(places)
    return tensors


def _mapped(saved: SavedCheckpoint, path: str, notes: dict[str, Any]) -> dict[str, Tensor]:
    mapped = MappedPart(path, saved, 0)
    return {
        spec.name: expose(mapped.tensor(spec), notes.get(spec.name, {}).get("dtype"))
        for spec in saved.parts[0].tensors
    }


def _dress(tensor: Tensor, note: dict[str, Any]) -> Tensor:
    requires_grad = bool(note.get("requires_grad"))
    if note.get("parameter"):
        return nn.Parameter(tensor, requires_grad=requires_grad)
    return tensor.requires_grad_(requires_grad)
