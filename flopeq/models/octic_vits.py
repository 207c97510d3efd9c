"""What the hybrids of octic-vits (Nordström et al. 2025, github.com/davnords/octic-vits) compute in another way.

Their published weights depend on it. A network computes so with `octic_vits="hybrid"`, their H8, or "invariant", their
I8. `flopeq convert` writes this argument beside the weights. docs/departures.md lists the differences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from flopeq.groups import D4, TRIVIAL, Group

OcticVits = Literal["hybrid", "invariant"]


class ConcatenatedIrreps(nn.Module):
    """Features for ordinary blocks without a change to the regular basis: the irreps in the order of octic-vits.

    The two-dimensional irrep comes last: the first half of its channels with both rows, then the second half. The
    second row has a sign, because theirs is the first row turned by a quarter, and here it is the first transposed.
    The signs are a buffer that is saved, so that the weights do not load into a network that computes something else.

    Shape: (..., C) -> (..., C).
    """

    signs: Tensor

    def __init__(self, num_channels: int, device=None, dtype=None) -> None:
        super().__init__()
        self.register_buffer("signs", torch.empty(num_channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Writes the signs again."""
        nn.init.ones_(self.signs)
        self.signs.chunk(8)[5].neg_()
        self.signs.chunk(8)[7].neg_()

    def forward(self, x: Tensor) -> Tensor:
        a1, a2, b1, b2, e = D4.split(x)
        first, second = e.chunk(2, -1)
        return torch.cat([a1, a2, b1, b2, first.flatten(-2), second.flatten(-2)], -1) * self.signs


class PowerSpectrum(nn.Module):
    """Features for ordinary blocks that no symmetry changes: a linear map of the power spectrum of each token.

    The power spectrum has the features of a1, the absolute values of those of a2, b1 and b2, and the norms over the two
    rows of e.

    Shape: (..., C) -> (..., C).
    Cost: 6/8 C^2 multiply-adds per token.
    """

    def __init__(self, num_channels: int, device=None, dtype=None) -> None:
        super().__init__()
        self.proj = nn.Linear(6 * num_channels // 8, num_channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        a1, a2, b1, b2, e = D4.split(x)
        return self.proj(torch.cat([a1, a2.abs(), b1.abs(), b2.abs(), torch.linalg.vector_norm(e, dim=-2)], -1))


class SplitBlock(Block):
    """The first ordinary block of a hybrid of octic-vits, with the layer `split` before it."""

    def __init__(self, octic_vits: OcticVits, dim: int, *args: Any, device=None, dtype=None, **kwargs: Any) -> None:
        super().__init__(dim, *args, device=device, dtype=dtype, **kwargs)
        self.split = (ConcatenatedIrreps if octic_vits == "hybrid" else PowerSpectrum)(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super().forward(self.split(x), attn_mask, is_causal)


def make_octic_block(
    octic_vits: OcticVits, groups: Sequence[Group], make_block: Callable[..., Any], depth: int, dim: int, **kwargs: Any
) -> nn.Module:
    """Makes the block with index `depth`. `make_block` makes the same block of flopeq's own networks."""
    if groups[depth] is TRIVIAL and groups[depth - 1] is D4:
        return SplitBlock(octic_vits, dim, depth=depth, **kwargs)
    block = make_block(depth=depth, dim=dim, **kwargs)
    if groups[depth] is D4:
        for norm in (block.norm1, block.norm2):
            norm.squared_dims, norm.eps = False, 1e-5
    return block


def check_octic_vits(octic_vits: str, groups: Sequence[Group]) -> None:
    """Raises ValueError for an unknown value, and unless the network has blocks of D4 and then ordinary blocks."""
    known = get_args(OcticVits)
    if octic_vits not in known:
        raise ValueError(f"octic_vits={octic_vits!r} is unknown: use one of {', '.join(map(repr, known))}")
    if groups[0] is not D4 or set(groups) != {D4, TRIVIAL}:
        raise ValueError(f"octic_vits={octic_vits!r} is for blocks of d4 and then ordinary ones, as in symmetry='d4:6'")
