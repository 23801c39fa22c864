"""Watches the steps of all optimizers of the process, where nobody hands over the optimizers.

torch calls the hook ahead of every step(): it learns which optimizers there are, hence which
tensors only their steps write, and makes a step wait for the captures that are in progress.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook


class StepWatch:
    """The one watch of the process: step_watch() has it.

    Attributes:
        step_count: steps of all optimizers so far.
    """

    def __init__(self) -> None:
        self._stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._trusted: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._step: int | None = None
        self.step_count = 0
        self._waits: list[Callable[[], None]] = []
        self._handle = register_optimizer_step_pre_hook(self._before_step)

    @property
    def has_stepped(self) -> bool:
        """Whether any optimizer has since forget()."""
        return len(self._stepped) > 0 or len(self._trusted) > 0

    def trust(self, step: int) -> None:
        """A save of this step begins: trust the optimizers whose hook ran since the step before.

        One that steps inside torch.compile runs no hook. It would write while a capture goes on,
        so what it has stepped before does not count for later saves.
        """
        if step != self._step:
            self._trusted, self._stepped = self._stepped, weakref.WeakSet()
            self._step = step

    def is_behind_step(self) -> Callable[[Tensor], bool]:
        """Tells whether a tensor is a parameter or state of a trusted optimizer, by its storage."""
        storages = {
            tensor.untyped_storage().data_ptr()
            for optimizer in self._trusted
            for tensor in _tensors_of(optimizer)
        }

        def is_behind_step(tensor: Tensor) -> bool:
            return tensor.untyped_storage().data_ptr() in storages

        return is_behind_step

    def wait_before_step(self, wait: Callable[[], None]) -> None:
        """Call `wait`, which must not raise, once before the next write of any optimizer."""
        self._waits.append(wait)

    def forget(self) -> None:
        """Forget which optimizers have stepped: a training has ended."""
        self._stepped.clear()
        self._trusted.clear()
        self._step = None

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # Within torch.compile this does nothing, and trusts nobody: saves are then eager.
        if torch.compiler.is_compiling():
            return None
        self.step_count += 1
        self._stepped.add(optimizer)
        if not self._waits:
            return None
        # Forward and backward run inside of step(closure), which is how Lightning trains. torch's
        # own optimizers write nothing before their first closure() has returned; others might.
        is_known = type(optimizer).__module__.startswith("torch.optim.")
        if is_known and callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._waiting(kwargs["closure"])}
        if is_known and len(args) > 1 and callable(args[1]):
            return (args[0], self._waiting(args[1]), *args[2:]), kwargs
        self._wait()
        return None

    def _waiting(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        @functools.wraps(closure)
        def run_and_wait() -> Any:
            result = closure()
            self._wait()
            return result

        return run_and_wait

    def _wait(self) -> None:
        waits, self._waits = self._waits, []
        for wait in waits:
            wait()


@functools.cache
def step_watch() -> StepWatch:
    """The watch; from the first call on torch calls its hook."""
    return StepWatch()


def _tensors_of(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        if isinstance(state, dict):
            yield from (value for value in state.values() if isinstance(value, Tensor))
