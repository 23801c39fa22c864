"""The random numbers of each batch come from its number, not from what was drawn before it.

Batch `number` of a pass draws from global generators of Python, NumPy and torch (CPU) that were
seeded by (the pass's seed, `number`), in whichever process it is loaded. So a pass may be entered
anywhere, with any number of workers. In a worker the seeding happens while the batch's indices are
unpickled, immediately ahead of the fetch: the dataset, collate_fn and worker_init_fn stay the
user's own objects, unwrapped. In the main process `preserved_rng()` puts the generators back.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

# Numbers from here on seed the sampler, whose draws must not be those of the batch beside it.
SAMPLER = 2**62
# Ahead of the sampler's and the dataset's __iter__().
ENTRY = SAMPLER - 1

_MASK = 2**64 - 1


def seed_rng(seed: int, number: int) -> None:
    """Seed the three global generators of this process.

    CUDA's generators stay as they are: workers do not draw from them, and the main process's are
    the training's.

    Args:
        seed: of the pass, 0 to 2^63 - 1.
        number: of the batch, or one of the numbers above.
    """
    key = _mix(seed ^ _mix(number))
    torch.default_generator.manual_seed(key)
    # Python's and NumPy's are both MT19937: equal seeds would be equal streams.
    random.seed(_mix(key ^ 1))
    if _numpy_is_seedable():
        np.random.seed(_mix(key ^ 2) >> 32)


def preserve_rng() -> Callable[[], None]:
    """Note the global generators' states; the result puts them back."""
    torch_state = torch.default_generator.get_state()
    python_state = random.getstate()
    numpy_state = np.random.get_state() if _numpy_is_seedable() else None

    def restore() -> None:
        torch.default_generator.set_state(torch_state)
        random.setstate(python_state)
        if numpy_state is not None:
            np.random.set_state(numpy_state)

    return restore


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave the global generators as they were before."""
    restore = preserve_rng()
    try:
        yield
    finally:
        restore()


class SeededIndex:
    """What the sampler gave for one batch; unpickling it seeds the process and gives just that."""

    __slots__ = ("index", "number", "seed")

    def __init__(self, seed: int, number: int, index: Any) -> None:
        self.seed = seed
        self.number = number
        self.index = index

    def __reduce__(self) -> tuple[Callable[[int, int, Any], Any], tuple[int, int, Any]]:
        return _unpack, (self.seed, self.number, self.index)


def _unpack(seed: int, number: int, index: Any) -> Any:
    """Runs in the worker, in Queue.get() of torch's _worker_loop(), which fetches next."""
    seed_rng(seed, number)
    return index


def _numpy_is_seedable() -> bool:
    """Not so after np.random.set_bit_generator(): such a generator stays the user's affair."""
    # NumPy's stubs leave get_bit_generator() out.
    current = np.random.get_bit_generator()  # type: ignore[attr-defined]
    return isinstance(current, np.random.MT19937)


def _mix(value: int) -> int:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014): close inputs, unrelated outputs."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
