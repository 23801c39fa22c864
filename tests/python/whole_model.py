"""A model as users write them, in a module that can be imported."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

TOKENS = torch.tensor([1, 5, 9, 5])
ALLOW = ("torch.nn", "whole_model")


def quantised() -> Tensor:
    """A quantised tensor, without torch's warning that they go away."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)


class Net(nn.Module):
    """Tied weights, a buffer that is state, one that is not, and a plain tensor."""

    def __init__(self, hidden: int, scale: float = 2.0) -> None:
        """Make it."""
        super().__init__()
        self.embed = nn.Embedding(16, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.head = nn.Linear(hidden, 16, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(hidden) * scale, persistent=False)
        self.offsets = torch.linspace(0, 1, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n] tokens to [n, 16] scores."""
        return self.head(self.norm(self.embed(tokens) * self.table + self.offsets))


class Plain(nn.Module):
    """Takes no arguments."""

    def __init__(self) -> None:
        """Make it."""
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, batch: Tensor) -> Tensor:
        """[n, 3] to [n, 3]."""
        return self.layer(batch)


def make_net(hidden: int) -> Net:
    """A factory."""
    return Net(hidden, scale=0.5)


def trained(model: nn.Module, batch: Tensor = TOKENS) -> nn.Module:
    """The model with values that no constructor makes, in training mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model(batch)
    return model


def compute(model: nn.Module, batch: Tensor = TOKENS) -> Tensor:
    """What a copy of the model computes in eval mode."""
    return copy.deepcopy(model).eval()(batch)
