"""Layer norm with one scale that both halves share, and LayerScale."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn

from flopeq.irreps import SQRT_HALF, half, split
from flopeq.layers.halves import Halves, from_halves, to_halves


class FlopLayerNorm(nn.Module):
    """y = w * (x - mean of its half) / sqrt((var_even + var_odd + eps) / 2), plus a bias on the even half.

    The flop changes the norm of neither half (sec. 3.3). The layer subtracts the mean of each half, and both halves
    share one scale. As in the authors' code, eps is added before the division by 2, so its effect is eps/2.

    Shape: (..., C) -> (..., C); a pair of halves gives a pair. Statistics are computed in float32 or higher precision.
    Raises: ValueError if C does not split into two halves.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(half(num_channels, "num_channels"), device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Sets the weight to 1 and the bias to 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor | Halves) -> Tensor | Halves:
        even, odd = to_halves(x)
        dtype = even.dtype
        even, odd = (part.to(torch.promote_types(dtype, torch.float32)) for part in (even, odd))
        # Reusing the centered features compiles into fewer passes over them than var_mean.
        even, odd = (part - part.mean(-1, keepdim=True) for part in (even, odd))
        var_even, var_odd = (part.square().mean(-1, keepdim=True) for part in (even, odd))
        scale = 1 / (SQRT_HALF * torch.sqrt(var_even + var_odd + self.eps))
        w_even, w_odd = split(self.weight)
        even, odd = even * scale * w_even + self.bias, odd * scale * w_odd
        return from_halves((even.to(dtype), odd.to(dtype)), like=x)

    def extra_repr(self) -> str:
        return f"{len(self.bias)}e+{len(self.bias)}o, eps={self.eps}"


class FlopLayerScale(LayerScale):
    """timm's LayerScale, y = gamma * x, which also takes separate halves.

    Shape: (..., C) -> (..., C); a pair of halves gives a pair.
    """

    def forward(self, x: Tensor | Halves) -> Tensor | Halves:
        even, odd = to_halves(x)
        gamma_even, gamma_odd = split(self.gamma)
        return from_halves((gamma_even * even, gamma_odd * odd), like=x)
