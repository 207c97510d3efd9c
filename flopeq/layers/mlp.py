"""The activation in the regular basis, and the MLP that uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from flopeq.irreps import butterfly
from flopeq.layers.halves import Halves, call_unless_identity, from_halves, to_halves
from flopeq.layers.linear import FlopLinear
from flopeq.layers.norm import FlopLayerNorm


class FlopGELU(nn.Module):
    """GELU in the regular basis, where the flop permutes features: change basis, apply GELU, change back (eq. 3).

    Shape: (..., C) -> (..., C); a pair of halves gives a pair.
    """

    def forward(self, x: Tensor | Halves) -> Tensor | Halves:
        a, b = butterfly(*to_halves(x))
        return from_halves(butterfly(F.gelu(a), F.gelu(b)), like=x)


class FlopMlp(nn.Module):
    """Two equivariant linear maps with an equivariant activation between them. It replaces timm's `Mlp`.

    Shape: (..., in_features) -> (..., out_features); a pair of halves gives a pair. With `even_only` the layer returns
    the even half, a tensor (..., out_features/2), and leaves out the product for the odd half.
    Cost: in*hidden/2 + hidden*out/2 multiply-adds per token; `even_only` saves half of the second product.
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

    def forward(self, x: Tensor | Halves, even_only: bool = False) -> Tensor | Halves:
        even, odd = self.act(self.fc1(to_halves(x)))
        even, odd = call_unless_identity(self.norm, (self.drop1(even), self.drop1(odd)))
        if even_only:
            return self.drop2(self.fc2((even, odd), even_only=True))
        even, odd = self.fc2((even, odd))
        return from_halves((self.drop2(even), self.drop2(odd)), like=x)
