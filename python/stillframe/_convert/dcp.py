"""Directories of torch.distributed.checkpoint, written by it and read without its unpickler."""

from __future__ import annotations

import dataclasses
import enum
import io
import os
import pathlib
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata, state_dict_saver

from stillframe._convert.files import Plan, Segment
from stillframe._convert.source import ExportSource, as_data_loss
from stillframe._convert.torch_files import no_pickle
from stillframe._convert.zip_files import FileSlice, check_zip
from stillframe.errors import DataLoss, InvalidArgument, NotFound

METADATA = ".metadata"


class _CountingWriter(filesystem.FileSystemWriter):
    """The stock writer, which also tells how far it is."""

    def __init__(self, path: str, wrote: Callable[[int], None]) -> None:
        super().__init__(path, single_file_per_rank=True, thread_count=1, sync_files=True)
        self.fs = _CountingFiles(wrote)

    def storage_meta(self) -> metadata.StorageMeta | None:
        """The stock one without the path, which is a temporary one here."""
        found = super().storage_meta()
        return found and dataclasses.replace(found, checkpoint_id=None)


class _CountingFiles(filesystem.FileSystem):
    def __init__(self, wrote: Callable[[int], None]) -> None:
        self._wrote = wrote

    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Any:
        if "w" not in mode:
            return super().create_stream(path, mode)
        return _CountingStream(path, self._wrote)


class _CountingStream(io.FileIO):
    """Unbuffered: tensors are large, and what is small comes in few pieces."""

    def __init__(self, path: str | os.PathLike[str], wrote: Callable[[int], None]) -> None:
        super().__init__(path, "w")
        self._told = wrote
        self._begun = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            count = super().write(view[done : done + 8 * 2**20]) or 0
            done += count
            self._told(count)
        end = self.tell()
        os.posix_fadvise(self.fileno(), self._begun, end - self._begun, os.POSIX_FADV_DONTNEED)
        self._begun = end
        return done


def write(source: ExportSource, root: dict[str, Any], target: str) -> list[str]:
    """Write `root` as dcp.save() does, durably; returns the names of the files."""
    os.mkdir(target, 0o700)
    with warnings.catch_warnings():
        # It says that it saves in a single process, which is what is wanted.
        warnings.simplefilter("ignore")
        state_dict_saver.save(
            root, storage_writer=_CountingWriter(target, source.wrote), no_dist=True
        )
    directory = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return sorted(os.listdir(target))


class Chunks:
    """A tensor's place in the files: `tensor` has its dtype and shape, and no memory."""

    def __init__(self, directory: str, name: str, entry: Any, infos: list[Any]) -> None:
        self.tensor = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        self._directory = directory
        self._name = name
        self._chunks = list(zip(entry.chunks, infos, strict=True))
        _check_tiles(f"{directory}: {name}", entry.size, entry.chunks)

    def segments(self, plan: Plan) -> list[Segment]:
        """Its bytes in the order of its elements; those of other shards through the scratch."""
        if self.tensor.numel() == 0:
            return []
        ordered = sorted(self._chunks, key=lambda pair: tuple(pair[0].offsets))
        whole_rows = all(chunk.sizes[1:] == self.tensor.shape[1:] for chunk, _ in ordered)
        found = [self._chunk(plan, chunk, info) for chunk, info in ordered if _count(chunk)]
        if whole_rows and all(segment is not None for segment, _ in found):
            return [segment for segment, _ in found if segment is not None]
        target, segment = plan.scratch_tensor(self.tensor.shape, self.tensor.dtype)
        for (chunk, _), (_, values) in zip(
            [pair for pair in ordered if _count(pair[0])], found, strict=True
        ):
            box = tuple(
                slice(first, first + size)
                for first, size in zip(chunk.offsets, chunk.sizes, strict=True)
            )
            target[box].copy_(values())
        return [segment]

    def _chunk(
        self, plan: Plan, chunk: Any, info: Any
    ) -> tuple[Segment | None, Callable[[], Tensor]]:
        path = os.path.join(self._directory, info.relative_path)
        where = f"{path}: {self._name}"
        with open(path, "rb") as file:
            part = FileSlice(file, info.offset, info.length)
            begins = check_zip(where, part)
            part.seek(0)
            saved = _load(where, part)
        begin = [at for name, at in begins.items() if name.endswith("/data/0")]
        fits = (
            isinstance(saved, Tensor)
            and saved.shape == chunk.sizes
            and saved.dtype == self.tensor.dtype
            and len(begin) == 1
        )
        if not fits:
            raise DataLoss(f"{where}: is not the tensor that {METADATA} says")
        file_offset = info.offset + begin[0]
        item_bytes = saved.element_size()
        index = plan.add_file(os.path.abspath(path))

        def values() -> Tensor:
            size = saved.untyped_storage().nbytes()
            whole = torch.from_file(path, size=os.path.getsize(path), dtype=torch.uint8)
            flat = whole[file_offset:][:size]
            if flat.data_ptr() % item_bytes != 0:
                flat = flat.clone()
            typed = flat.view(saved.dtype)
            # as_strided() counts from the storage's first element, not from the view's.
            first_element = typed.storage_offset() + saved.storage_offset()
            return typed.as_strided(saved.size(), saved.stride(), first_element)

        if not saved.is_contiguous():
            return None, values
        first = file_offset + saved.storage_offset() * item_bytes
        return (index, first, saved.numel() * item_bytes), values


def read(directory: str) -> tuple[Any, dict[int, Chunks], list[str]]:
    """What the directory holds; its tensors have no memory, and Chunks by id() beside them.

    Raises:
        NotFound: it has no .metadata, or lacks a file that it names.
        DataLoss: it is corrupt or truncated.
        InvalidArgument: it holds more than tensors and plain values; it was not unpickled.
    """
    found = _read_metadata(directory)
    sizes: dict[str, int] = {}
    infos: dict[str, list[Any]] = {}
    for index, info in found.storage_data.items():
        _check_place(directory, index.fqn, info, sizes)
        infos.setdefault(index.fqn, []).append((index, info))
    paths = found.planner_data or {}
    root: dict[Any, Any] = {}
    chunks: dict[int, Chunks] = {}
    notes: list[str] = []
    for name, entry in found.state_dict_metadata.items():
        value: Any
        if isinstance(entry, metadata.TensorStorageMetadata):
            by_offset = {tuple(i.offset or ()): info for i, info in infos.get(name, [])}
            try:
                own = [by_offset[tuple(chunk.offsets)] for chunk in entry.chunks]
            except KeyError:
                raise DataLoss(f"{directory}: {METADATA} does not say where {name} is") from None
            placed = Chunks(directory, name, entry, own)
            value = placed.tensor
            chunks[id(value)] = placed
        else:
            try:
                value = _read_value(directory, name, infos.get(name, []))
            except InvalidArgument as error:
                if paths.get(name, (name,))[0] in ("model", "optimizer"):
                    raise
                notes.append(str(error))
                continue
        _put(root, paths.get(name, (name,)), value)
    return _with_lists(root), chunks, notes


def _read_value(directory: str, name: str, infos: list[tuple[Any, Any]]) -> Any:
    if len(infos) != 1:
        raise DataLoss(f"{directory}: {METADATA} does not say where {name} is")
    info = infos[0][1]
    path = os.path.join(directory, info.relative_path)
    with open(path, "rb") as file:
        part = FileSlice(file, info.offset, info.length)
        check_zip(f"{path}: {name}", part)
        part.seek(0)
        return _load(f"{path}: {name}", part, map_location="cpu")


def _load(where: str, file: FileSlice, map_location: str = "meta") -> Any:
    try:
        return torch.load(file, map_location=map_location, weights_only=True)  # type: ignore[arg-type]
    except pickle.UnpicklingError as error:
        raise InvalidArgument(no_pickle(where, error)) from error
    except (RuntimeError, ValueError, KeyError, EOFError) as error:
        raise as_data_loss(where, error) from error


def _check_place(directory: str, name: str, info: Any, sizes: dict[str, int]) -> None:
    file = info.relative_path
    # A file of this directory and no path out of it.
    if not isinstance(file, str) or pathlib.PurePath(file).name != file or file in ("", ".", ".."):
        raise DataLoss(f"{directory}: {METADATA} has {name} in {file!r}")
    if getattr(info, "transform_descriptors", None):
        raise InvalidArgument(
            f"{directory}: {name} was written by an extension ({info.transform_descriptors}); "
            "save it again without"
        )
    if file not in sizes:
        try:
            sizes[file] = os.path.getsize(os.path.join(directory, file))
        except FileNotFoundError:
            raise NotFound(
                f"{directory}: {METADATA} names {file}, which is missing; fetch it again"
            ) from None
    if not 0 <= info.offset <= info.offset + info.length <= sizes[file]:
        raise DataLoss(
            f"{directory}: {file} has {sizes[file]} bytes, and {name} is at {info.offset} + "
            f"{info.length}: truncated"
        )


def _check_tiles(where: str, size: Any, chunks: list[Any]) -> None:
    """Chunks are to cover the tensor, each element once: a lost shard is silent elsewhere."""
    within = all(
        first >= 0 and first + length <= whole
        for chunk in chunks
        for first, length, whole in zip(chunk.offsets, chunk.sizes, size, strict=True)
    )
    boxes = [
        [(f, f + n) for f, n in zip(chunk.offsets, chunk.sizes, strict=True)]
        for chunk in chunks
        if _count(chunk)
    ]
    overlaps = any(
        all(a[0] < b[1] and b[0] < a[1] for a, b in zip(one, other, strict=True))
        for i, one in enumerate(boxes)
        for other in boxes[:i]
    )
    if not within or overlaps or sum(map(_count, chunks)) != torch.Size(size).numel():
        raise DataLoss(f"{where}: its chunks do not tile a tensor of {list(size)}")


def _count(chunk: Any) -> int:
    return torch.Size(chunk.sizes).numel()


def _put(root: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    at = root
    for key in path[:-1]:
        at = at.setdefault(key, {})
    at[path[-1]] = value


def _with_lists(value: Any) -> Any:
    """Dictionaries whose keys are 0, 1, ... are the lists that DCP took apart."""
    if not isinstance(value, dict):
        return value
    made = {key: _with_lists(item) for key, item in value.items()}
    if made and all(isinstance(key, int) for key in made):
        return [made[key] for key in sorted(made)]
    return made


_SAFE_CLASSES: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
    ("torch.serialization", "_get_layout"): lambda name: {
        "torch.strided": torch.strided,
        "torch.sparse_coo": torch.sparse_coo,
    }[name],
    **{
        (module.__name__, name): getattr(module, name)
        for module, names in (
            (
                metadata,
                (
                    "BytesStorageMetadata",
                    "ChunkStorageMetadata",
                    "Metadata",
                    "MetadataIndex",
                    "StorageMeta",
                    "TensorProperties",
                    "TensorStorageMetadata",
                    "_MEM_FORMAT_ENCODING",
                ),
            ),
            (filesystem, ("_StorageInfo", "_StoragePrefix")),
        )
        for name in names
        if hasattr(module, name)
    },
}


class _MetadataUnpickler(pickle.Unpickler):
    """Makes the plain records of a .metadata and nothing else, so that no code of it runs."""

    def find_class(self, module: str, name: str) -> Any:
        found = _SAFE_CLASSES.get((module, name))
        if found is None and module == "torch":
            dtype = getattr(torch, name, None)
            found = dtype if isinstance(dtype, torch.dtype) else None
        if (module, name) == ("builtins", "getattr"):
            found = _enum_member
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return found


def _enum_member(kind: Any, name: Any) -> enum.Enum:
    """What Python 3.11.0 to 3.11.3 pickles a member of an enumeration as: getattr(kind, name)."""
    if isinstance(kind, enum.EnumMeta) and isinstance(name, str) and name in kind.__members__:
        member: enum.Enum = kind[name]
        return member
    raise pickle.UnpicklingError("builtins.getattr")


def _read_metadata(directory: str) -> Any:
    path = os.path.join(directory, METADATA)
    try:
        with open(path, "rb") as file:
            found = _MetadataUnpickler(file).load()
    except FileNotFoundError:
        raise NotFound(f"{directory} has no {METADATA}: it is no checkpoint of DCP") from None
    except NotADirectoryError:
        raise NotFound(f"{directory} is not a directory") from None
    except pickle.UnpicklingError as error:
        raise InvalidArgument(no_pickle(path, error)) from error
    except Exception as error:
        # A damaged pickle fails in any way.
        raise as_data_loss(path, error) from error
    if not isinstance(found, metadata.Metadata) or found.storage_data is None:
        raise DataLoss(f"{path} is not the metadata of a DCP checkpoint")
    return found
