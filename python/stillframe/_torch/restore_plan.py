"""What a restore found unfit, and what it is going to fill."""

from __future__ import annotations

import torch
from torch import Tensor

from stillframe._core.layout import TensorSpec
from stillframe._core.saved import Place, SavedCheckpoint, SavedTensor
from stillframe._torch.tensors import (
    local_tensor,
    memory_kind,
    spec_of,
    stride_bytes,
    torch_dtype,
)
from stillframe.errors import DataLoss, InvalidArgument


class Problems:
    """Collects every mismatch, so that one error can list them all."""

    def __init__(self, *, is_strict: bool) -> None:
        self._is_strict = is_strict
        self._lines: dict[str, list[str]] = {}

    def missing(self, names: list[str]) -> None:
        """The checkpoint lacks these."""
        if self._is_strict and names:
            self._lines.setdefault("missing in the checkpoint", []).extend(names)

    def unknown(self, names: list[str]) -> None:
        """Only the checkpoint has these."""
        if self._is_strict and names:
            self._lines.setdefault("only in the checkpoint", []).extend(names)

    def other(self, line: str) -> None:
        """Anything else, that strict=False does not excuse."""
        self._lines.setdefault("other", []).append(line)

    def fits(self, name: str, wanted: TensorSpec, live: Tensor) -> bool:
        """Whether dtype and shape are equal; notes it if not."""
        spec = spec_of(name, local_tensor(name, live))
        if wanted.shape != spec.shape:
            if self._is_strict:
                self._lines.setdefault("other shape", []).append(
                    f"{name} is {list(spec.shape)}, in the checkpoint {list(wanted.shape)}"
                )
            return False
        if wanted.dtype != spec.dtype:
            self._lines.setdefault("other dtype", []).append(
                f"{name} is {spec.dtype}, in the checkpoint {wanted.dtype}"
            )
            return False
        return True

    def raise_if_any(self, what: str) -> None:
        """Raise InvalidArgument with all of them."""
        if self._lines:
            listed = "\n".join(f"  {kind}: {', '.join(v)}" for kind, v in self._lines.items())
            count = sum(map(len, self._lines.values()))
            raise InvalidArgument(
                f"{what} does not fit, and nothing was restored; {count} differences:\n{listed}\n"
                "strict=False skips names and shapes that differ, map_names= maps names, only= "
                "selects"
            )


class Targets:
    """Memory that one read is going to fill."""

    def __init__(self, saved: SavedCheckpoint) -> None:
        self._by_name = {
            name: tensor for part in saved.tensors.values() for name, tensor in part.items()
        }
        self._first: dict[SavedTensor, Tensor] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._new: dict[str, Tensor] = {}
        self.places: list[Place] = []

    def saved(self, name: str) -> SavedTensor:
        """The saved tensor that a `$tensor` names."""
        found = self._by_name.get(name)
        if found is None:
            raise DataLoss(f"state.json refers to a tensor {name} that no part holds")
        return found

    def add(self, saved: SavedTensor, name: str, live: Tensor) -> None:
        """Fill `live`, whose dtype and shape fit."""
        memory = local_tensor(name, live)
        first = self._first.setdefault(saved, memory)
        if first is not memory:
            # One saved tensor for two that are no longer tied.
            self._copies.append((first, memory.detach()))
            return
        if memory.is_cuda and not memory.is_contiguous():
            # A GPU is filled by its copy engine, which knows no strides.
            filled = torch.empty(memory.shape, dtype=memory.dtype, device=memory.device)
            self._copies.append((filled, memory.detach()))
            memory = filled
        self.places.append(
            Place(saved, memory.data_ptr(), stride_bytes(memory), memory_kind(memory))
        )

    def add_new(self, name: str, device: torch.device | None = None) -> Tensor:
        """A new tensor that is going to hold what was saved under this name; None: of the CPU."""
        if name not in self._new:
            saved = self.saved(name)
            self._new[name] = torch.empty(
                saved.spec.shape, dtype=torch_dtype(saved.spec.dtype), device=device or "cpu"
            )
            self.add(saved, name, self._new[name])
        return self._new[name]

    def finish(self) -> None:
        """After the read: copies to twins, and tells autograd that the memory was written."""
        with torch.no_grad():
            for source, target in self._copies:
                target.copy_(source)
        written = [tensor for tensor in self._first.values() if not tensor.is_inference()]
        torch.autograd.graph.increment_version(written)
