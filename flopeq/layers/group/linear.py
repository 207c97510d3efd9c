"""The linear layer that commutes with a group."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flopeq.backends.onednn import linear
from flopeq.groups import Group, Parts
from flopeq.layers.group.parts import describe_parts, from_parts, multiplicities, to_parts
from flopeq.layers.linear import check_no_bias


class GroupLinear(nn.Module):
    """Equivariant linear map, block diagonal by Schur's lemma: y_i = W_i x_i for each irrep i, plus a bias.

    Only the first irrep, which is trivial, has a bias, because another constant would break equivariance. The rows of a
    two-dimensional irrep share their weights. The submodules are named by the irreps.

    Shape: (..., in_features) -> (..., out_features); a tuple of parts gives a tuple.
    Cost: sum of d^3 over the irreps, times in*out/|G|^2, multiply-adds per token: 1/2 of nn.Linear for C2, 1/4 for
    C2 x C2, 3/16 for D4. It has 1/|G| of the weights.
    Raises: ValueError if a width is not a multiple of |G|, or if another irrep has a bias when it is called.
    """

    def __init__(
        self, group: Group, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.group, self.in_features, self.out_features = group, in_features, out_features
        inner = multiplicities(group, in_features, "in_features")
        outer = multiplicities(group, out_features, "out_features")
        for index, irrep in enumerate(group.irreps):
            self.add_module(irrep.name, nn.Linear(inner[index], outer[index], bias=bias and index == 0, **dd))

    def forward(self, x: Tensor | Parts) -> Tensor | Parts:
        names = [irrep.name for irrep in self.group.irreps]
        for name in names[1:]:
            check_no_bias(getattr(self, name), name)
        parts = to_parts(self.group, x)
        mapped = tuple(linear(getattr(self, name), part) for name, part in zip(names, parts, strict=True))
        return from_parts(self.group, mapped, like=x)

    def extra_repr(self) -> str:
        inner, outer = (describe_parts(self.group, width) for width in (self.in_features, self.out_features))
        return f"{inner} -> {outer}"
