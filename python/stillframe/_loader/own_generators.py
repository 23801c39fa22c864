"""Generator objects that a DataLoader and its samplers hold, and their states as plain values."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_GLOBAL = (torch.default_generator, random._inst, np.random.mtrand._rand)
_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def find_generators(loader: Any) -> dict[str, Any]:
    """Each generator once, by where it is, such as "generator" or "sampler.generator".

    The process's global ones are left out, also where they were passed as `generator=`.
    """
    found: dict[str, Any] = {}
    for path, value in _candidates(loader):
        is_new = not any(value is other for other in (*found.values(), *_GLOBAL))
        if isinstance(value, _KINDS) and is_new:
            found[path] = value
    return found


def get_state(generator: Any) -> Any:
    """The state as values that state.json takes; not changed by later draws."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return copy.deepcopy(generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate()


def set_state(generator: Any, state: Any) -> None:
    """Set what get_state() gave."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.setstate(state)


def _candidates(loader: Any) -> Iterator[tuple[str, Any]]:
    yield "generator", loader.generator
    batch_sampler = loader.batch_sampler
    holders = {
        "sampler": loader.sampler,
        "batch_sampler": batch_sampler,
        "batch_sampler.sampler": getattr(batch_sampler, "sampler", None),
    }
    for path, holder in holders.items():
        for name, value in getattr(holder, "__dict__", {}).items():
            yield f"{path}.{name}", value
