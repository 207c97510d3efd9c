"""Features as two separate halves, and the residual connection on them."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from flopeq.irreps import join, split

Halves = tuple[Tensor, Tensor]
"""Even and odd features as two separate tensors."""


PartsT = TypeVar("PartsT", bound=tuple[Tensor, ...])


def to_halves(x: Tensor | Halves) -> Halves:
    """The halves of features, which are one tensor (..., C) or the two halves already."""
    return x if isinstance(x, tuple) else split(x)


def from_halves(halves: Halves, like: Tensor | Halves) -> Tensor | Halves:
    """The halves in the form of `like`: separate if `like` is a pair of halves, else joined."""
    return halves if isinstance(like, tuple) else join(*halves)


def call_unless_identity(layer: nn.Module, halves: PartsT) -> PartsT:
    """layer(halves). nn.Identity is not called, because torch.jit knows it for a single tensor only."""
    return halves if isinstance(layer, nn.Identity) else layer(halves)


def add_residual(x: Halves, update: Halves, drop_path: nn.Module) -> Halves:
    """x + drop_path(update) on separate halves (B, N, C/2).

    Stochastic depth drops both halves of an image's update or none.
    """
    even, odd = update
    if not isinstance(drop_path, nn.Identity):
        keep = drop_path(torch.ones_like(even[:, :1, :1]))
        even, odd = keep * even, keep * odd
    return x[0] + even, x[1] + odd
