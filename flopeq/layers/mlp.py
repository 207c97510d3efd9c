"""The activation in the regular basis, and the MLP that uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from flopeq.irreps import butterfly, join, split
from flopeq.layers.linear import FlopLinear, Halves
from flopeq.layers.norm import FlopLayerNorm


class FlopGELU(nn.Module):
    """GELU in the regular basis, where the flop permutes features: change basis, apply GELU, change back (eq. 3).

    Shape: (..., C) -> (..., C).
    """

    def forward(self, x: Tensor) -> Tensor:
        return join(*self.on_halves(*split(x)))

    def on_halves(self, even: Tensor, odd: Tensor) -> Halves:
        """`forward` on separate halves."""
        a, b = butterfly(even, odd)
        return butterfly(F.gelu(a), F.gelu(b))


class FlopMlp(nn.Module):
    """Two equivariant linear maps with an equivariant activation between them. It replaces timm's `Mlp`.

    Shape: (..., in_features) -> (..., out_features).
    Cost: in*hidden/2 + hidden*out/2 multiply-adds per token; `even_half` saves half of the second product.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], FlopGELU] = FlopGELU,
        norm_layer: Callable[..., FlopLayerNorm] | None = None,
        bias: bool = True,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden_features = hidden_features or in_features
        self.fc1 = FlopLinear(in_features, hidden_features, bias=bias, **dd)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.norm = norm_layer(hidden_features, **dd) if norm_layer else nn.Identity()
        self.fc2 = FlopLinear(hidden_features, out_features or in_features, bias=bias, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return join(*self.on_halves(*split(x)))

    def on_halves(self, even: Tensor, odd: Tensor) -> Halves:
        """`forward` on separate halves."""
        even, odd = self.fc2.on_halves(*self.hidden(even, odd))
        return self.drop2(even), self.drop2(odd)

    def even_half(self, even: Tensor, odd: Tensor) -> Tensor:
        """The even half of the result, without computing the odd half."""
        even, _ = self.hidden(even, odd)
        return self.drop2(self.fc2.even(even))

    def hidden(self, even: Tensor, odd: Tensor) -> Halves:
        """The features between the two linear maps."""
        even, odd = self.act.on_halves(*self.fc1.on_halves(even, odd))
        even, odd = self.drop1(even), self.drop1(odd)
        return (even, odd) if isinstance(self.norm, nn.Identity) else self.norm.on_halves(even, odd)
