"""Making a model whose parameters are about to be loaded, without computing first values for them.

Unlike a model on the meta device, everything else that a constructor makes is real: buffers that
are not saved, tables, plain tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_IN_PLACE = frozenset(
    {Tensor.bernoulli_, Tensor.cauchy_, Tensor.exponential_, Tensor.geometric_}
    | {Tensor.log_normal_, Tensor.normal_, Tensor.random_, Tensor.uniform_}
    | {Tensor.add_, Tensor.clamp_, Tensor.copy_, Tensor.div_, Tensor.erfinv_, Tensor.fill_}
    | {Tensor.mul_, Tensor.sub_, Tensor.zero_}
)
_INITIALISERS = frozenset(
    function
    for name, function in vars(nn.init).items()
    if name.endswith("_") and not name.startswith("_") and callable(function)
)


class SkipInitialisation(TorchFunctionMode):
    """Inside, what writes a whole Parameter in place does nothing; its memory stays untouched."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Leave out the call, or make it."""
        given = {} if kwargs is None else kwargs
        if func in _IN_PLACE or func in _INITIALISERS:
            target = args[0] if args else given.get("tensor")
            if isinstance(target, nn.Parameter):
                return target
        return func(*args, **given)


def make_without_values(make: Any) -> nn.Module:
    """Call a function that makes a model, on the CPU, without initialising its parameters."""
    with torch.device("cpu"), SkipInitialisation():
        model = make()
    assert isinstance(model, nn.Module)
    return model
