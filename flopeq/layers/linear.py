"""The equivariant linear layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flopeq.backends.onednn import linear
from flopeq.irreps import half
from flopeq.layers.halves import Halves, from_halves, to_halves


class FlopLinear(nn.Module):
    """Equivariant linear map, block diagonal by Schur's lemma: y = (W_even x_even + b) (+) (W_odd x_odd).

    The odd half has no bias, because a constant there would break equivariance (Bökman et al. 2025, sec. 3.1, eq. 2).

    Shape: (..., in_features) -> (..., out_features), each axis even then odd; a pair of halves gives a pair. With
    `even_only` the layer returns the even half, a tensor (..., out_features/2), and does not call `odd`.
    Cost: in*out/2 multiply-adds per token, half of nn.Linear.
    Raises: ValueError if either width does not split into two halves, or if `odd` has a bias when it is called.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, outer = half(in_features, "in_features"), half(out_features, "out_features")
        self.even = nn.Linear(inner, outer, bias=bias, **dd)
        self.odd = nn.Linear(inner, outer, bias=False, **dd)

    def forward(self, x: Tensor | Halves, even_only: bool = False) -> Tensor | Halves:
        even, odd = to_halves(x)
        even = linear(self.even, even)
        if even_only:
            return even
        check_no_bias(self.odd)
        return from_halves((even, linear(self.odd, odd)), like=x)

    def extra_repr(self) -> str:
        inner, outer = self.even.in_features, self.even.out_features
        return f"{inner}e+{inner}o -> {outer}e+{outer}o"


def check_no_bias(layer: nn.Module, irrep: str = "odd") -> None:
    """Raises ValueError if the layer of odd features has a bias, such as that of an adapter (PEFT's `lora_bias`).

    `irrep` is another name of features that a symmetry changes.
    """
    if type(layer) is nn.Linear and layer.bias is None:
        return
    for name, _ in layer.named_parameters():
        if name.rpartition(".")[2] == "bias":
            raise ValueError(
                f"the layer of {irrep} features has a bias, {name!r}: a constant on {irrep} features breaks the "
                f"mirror symmetry; turn the bias off (in PEFT: lora_bias=False), or do not adapt {irrep!r}"
            )
