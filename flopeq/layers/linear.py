"""The equivariant linear layer, and the residual connection on separate halves."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flopeq.backends.onednn import Linear
from flopeq.irreps import half, join, split

Halves = tuple[Tensor, Tensor]
"""Even and odd features as two separate tensors."""


class FlopLinear(nn.Module):
    """Equivariant linear map, block diagonal by Schur's lemma: y = (W_even x_even + b) (+) (W_odd x_odd).

    The odd half has no bias, because a constant there would break equivariance (Bökman et al. 2025, sec. 3.1, eq. 2).

    Shape: (..., in_features) -> (..., out_features), each axis even then odd.
    Cost: in*out/2 multiply-adds per token, half of nn.Linear.
    Raises: ValueError if either width does not split into two halves.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, outer = half(in_features, "in_features"), half(out_features, "out_features")
        self.even = Linear(inner, outer, bias=bias, **dd)
        self.odd = Linear(inner, outer, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return join(*self.on_halves(*split(x)))

    def on_halves(self, even: Tensor, odd: Tensor) -> Halves:
        """`forward` on separate halves."""
        return self.even(even), self.odd(odd)

    def extra_repr(self) -> str:
        inner, outer = self.even.in_features, self.even.out_features
        return f"{inner}e+{inner}o -> {outer}e+{outer}o"


def add_residual(x: Halves, update: Halves, scale: Tensor | None, drop_path: nn.Module) -> Halves:
    """x + drop_path(scale * update) on separate halves. `scale` is a vector (C,) over channels; None means 1.

    Stochastic depth drops both halves of an image's update or none.
    """
    even, odd = update
    if scale is not None:
        scale_even, scale_odd = split(scale)
        even, odd = scale_even * even, scale_odd * odd
    if not isinstance(drop_path, nn.Identity):
        keep = drop_path(even.new_ones(len(even), *(1,) * (even.ndim - 1)))
        even, odd = keep * even, keep * odd
    return x[0] + even, x[1] + odd
