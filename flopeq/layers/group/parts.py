"""Features as separate parts, one for each irrep of a group, and the residual connection on them."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from flopeq.groups import Group, Parts


def to_parts(group: Group, x: Tensor | Parts) -> Parts:
    """The parts of features, which are one tensor (..., C) or the parts already."""
    return x if isinstance(x, tuple) else group.split(x)


def from_parts(group: Group, parts: Parts, like: Tensor | Parts) -> Tensor | Parts:
    """The parts in the form of `like`: separate if `like` is a tuple of parts, else joined."""
    return parts if isinstance(like, tuple) else group.join(parts)


def multiplicities(group: Group, num_channels: int, what: str) -> list[int]:
    """How often each irrep occurs in features of that many channels: C/|G| times its dimension.

    Raises: ValueError if the number of channels is not a multiple of |G|.
    """
    copies = group.multiplicity(num_channels, what)
    return [irrep.dim * copies for irrep in group.irreps]


def split_scales(group: Group, scales: Tensor) -> list[Tensor]:
    """Scales for the parts, from one tensor with a scale for each occurrence of an irrep. Both rows share one scale."""
    ends = list(accumulate(irrep.dim for irrep in group.irreps))
    copies = scales.shape[0] // ends[-1]
    return [scales[start * copies : end * copies] for start, end in pairwise([0, *ends])]


def add_residual(group: Group, x: Parts, update: Parts, drop_path: nn.Module) -> Parts:
    """x + drop_path(update) on separate parts of tokens.

    Stochastic depth drops all parts of an image's update or none.
    """
    if not isinstance(drop_path, nn.Identity):
        keep = drop_path(torch.ones_like(update[0][:, :1, :1]))
        update = tuple(
            (keep if irrep.dim == 1 else keep[..., None]) * part
            for irrep, part in zip(group.irreps, update, strict=True)
        )
    return tuple(one + other for one, other in zip(x, update, strict=True))


def describe_parts(group: Group, num_channels: int) -> str:
    """Widths by irrep, such as "2a1+2a2+2b1+2b2+4e", for `extra_repr`."""
    copies = num_channels // group.order
    return "+".join(f"{irrep.dim * copies}{irrep.name}" for irrep in group.irreps)
