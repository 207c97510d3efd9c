"""Layers of E(ResMLP), whose features have a channel parity and a column parity (sec. 4.1)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.layers import DropPath
from timm.layers.activations import quick_gelu
from torch import Tensor, nn

from flopeq.backends.attached import may_use_weights
from flopeq.backends.onednn import linear, linear_without_bias
from flopeq.irreps import butterfly, change_basis, half, join, split


class ColumnParity:
    """The mirror symmetry of a grid's columns: converts between raster order and tokens of even and odd columns.

    `num_even` tokens are even, including the middle column of an odd grid; `num_odd` tokens are odd.
    """

    def __init__(self, grid_size: tuple[int, int]) -> None:
        self.height, self.width = grid_size
        self.num_odd = self.height * (self.width // 2)
        self.num_middle = self.height * (self.width % 2)
        self.num_even = self.num_odd + self.num_middle

    def mirror_basis(self, x_BNC: Tensor) -> Tensor:
        """Even and odd columns <-> left, middle and mirrored right columns. The map is its own inverse."""
        return change_basis(x_BNC, dim=1, fixed=self.num_middle)

    def from_raster(self, x_BNC: Tensor) -> Tensor:
        """Tokens in raster order -> tokens by parity."""
        grid_BHWC = x_BNC.unflatten(1, (self.height, self.width))
        left, middle, right = grid_BHWC.split(self._column_counts, dim=2)
        return self.mirror_basis(torch.cat([part.flatten(1, 2) for part in (left, middle, right.flip(2))], dim=1))

    def to_raster(self, x_BNC: Tensor) -> Tensor:
        """The inverse of `from_raster`."""
        parts = self.mirror_basis(x_BNC).split([self.num_odd, self.num_middle, self.num_odd], dim=1)
        left, middle, right = (
            parts[i].unflatten(1, (self.height, columns)) for i, columns in enumerate(self._column_counts)
        )
        return torch.cat((left, middle, right.flip(2)), dim=2).flatten(1, 2)

    @property
    def _column_counts(self) -> list[int]:
        """Numbers of columns on the left, in the middle and on the right."""
        return [self.width // 2, self.width % 2, self.width // 2]

    def split(self, x_BNC: Tensor) -> ParityParts:
        """Splits a tensor into its four parts."""
        even, odd = split(x_BNC)
        ee, eo = even.split([self.num_even, self.num_odd], dim=1)
        oe, oo = odd.split([self.num_even, self.num_odd], dim=1)
        return ParityParts(ee, eo, oe, oo)

    def join(self, parts: ParityParts) -> Tensor:
        """The inverse of `split`."""
        return join(torch.cat((parts.ee, parts.eo), dim=1), torch.cat((parts.oe, parts.oo), dim=1))

    def mix_columns(self, even: Tensor, odd: Tensor) -> tuple[Tensor, Tensor]:
        """Even and odd columns -> left columns, including the middle, and right columns. It is its own inverse."""
        paired, middle = even.split([self.num_odd, self.num_middle], dim=1)
        left, right = butterfly(paired, odd)
        return torch.cat((left, middle), dim=1) if self.num_middle else left, right


class ParityParts(NamedTuple):
    """Features by (channel, column) parity: (B, num_even, C/2) where the column is even, else (B, num_odd, C/2).

    A block keeps the parts separate, because each has its own weights. Between blocks they are joined in one tensor.
    """

    ee: Tensor
    eo: Tensor
    oe: Tensor
    oo: Tensor

    @property
    def invariant(self) -> Tensor:
        """The features that the flop leaves unchanged, ee then oo: (B, N, C/2)."""
        return torch.cat((self.ee, self.oo), dim=1)

    def scaled(self, scale: Tensor) -> ParityParts:
        """The parts multiplied by a vector (C,) over channels."""
        even, odd = split(scale)
        return ParityParts(even * self.ee, even * self.eo, odd * self.oe, odd * self.oo)


class BiparityAffine(nn.Module):
    """y = alpha * x + beta, with beta added to the invariant features only, even-even and odd-odd (eq. 6).

    Shape: parts of (B, N, C) -> the same.
    """

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, 1, dim, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(1, 1, dim, device=device, dtype=dtype))

    def forward(self, x: ParityParts) -> ParityParts:
        y = x.scaled(self.alpha)
        even, odd = split(self.beta)
        return y._replace(ee=y.ee + even, oo=y.oo + odd)


class BiparityLinear(nn.Module):
    """Block diagonal linear map over channels with a bias on each invariant part, even-even and odd-odd.

    In the image, the odd bias has opposite signs on mirrored columns.

    Shape: parts of (B, N, in_features) -> parts of (B, N, out_features).
    Cost: in*out/2 multiply-adds per token, half of nn.Linear.
    """

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None) -> None:
        super().__init__()
        inner, outer = half(in_features, "in_features"), half(out_features, "out_features")
        self.even = nn.Linear(inner, outer, device=device, dtype=dtype)
        self.odd = nn.Linear(inner, outer, device=device, dtype=dtype)

    def forward(self, x: ParityParts) -> ParityParts:
        if may_use_weights(self.even, self.odd):
            return ParityParts(
                linear(self.even, x.ee), linear_without_bias(self.even, x.eo),
                linear_without_bias(self.odd, x.oe), linear(self.odd, x.oo),
            )  # fmt: skip
        ee, eo = apply_with_and_without_bias(self.even, x.ee, x.eo)
        oo, oe = apply_with_and_without_bias(self.odd, x.oo, x.oe)
        return ParityParts(ee, eo, oe, oo)


class TokenMixing(nn.Module):
    """Block diagonal linear map over tokens, one block for even and one for odd columns (appendix C).

    Shape: parts of (B, N, C) -> the same.
    Cost: N^2/2 multiply-adds per channel on an even grid, half of nn.Linear.
    """

    def __init__(self, columns: ColumnParity, device=None, dtype=None) -> None:
        super().__init__()
        self.even = nn.Linear(columns.num_even, columns.num_even, device=device, dtype=dtype)
        self.odd = nn.Linear(columns.num_odd, columns.num_odd, device=device, dtype=dtype)

    def forward(self, x: ParityParts) -> ParityParts:
        if may_use_weights(self.even, self.odd):
            # Multiplies by the weights from the left, W x + b, which needs no transpose before and after.
            w_even, w_odd = (layer.weight.expand(x.ee.shape[0], -1, -1) for layer in (self.even, self.odd))
            b_even, b_odd = self.even.bias[:, None], self.odd.bias[:, None]
            return ParityParts(
                torch.baddbmm(b_even, w_even, x.ee), w_odd @ x.eo, w_even @ x.oe, torch.baddbmm(b_odd, w_odd, x.oo)
            )
        by_channel = ParityParts(*(part.transpose(1, 2) for part in x))
        ee, oe = apply_with_and_without_bias(self.even, by_channel.ee, by_channel.oe)
        oo, eo = apply_with_and_without_bias(self.odd, by_channel.oo, by_channel.eo)
        return ParityParts(*(part.transpose(1, 2) for part in (ee, eo, oe, oo)))


def apply_with_and_without_bias(layer: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(W x + b, W y) for a linear layer W, b, by a single call of the layer.

    The layer acts on the rows of x, of y, and on a row of zeros, whose result is b. Subtracting it is right for
    whatever is attached to the layer, such as an adapter, quantized weights or shards of the weights.

    Shape: (B, N, in_features), (B, M, in_features) -> (B, N, out_features), (B, M, out_features).
    """
    zero = x.new_zeros((x.shape[0], 1, x.shape[2]))
    x, y, bias = layer(torch.cat((x, y, zero), dim=1)).split([x.shape[1], y.shape[1], 1], dim=1)
    return x, y - bias


class BiparityMlp(nn.Module):
    """Channel MLP of E(ResMLP). The activation x*sigmoid(1.702x) acts in the basis where the flop permutes features.

    Shape: parts of (B, N, C) -> the same.
    """

    def __init__(
        self, dim: int, hidden_features: int, columns: ColumnParity, drop: float = 0.0, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.columns = columns
        self.fc1 = BiparityLinear(dim, hidden_features, device, dtype)
        self.fc2 = BiparityLinear(hidden_features, dim, device, dtype)
        self.drop = nn.Dropout(drop)

    def activate(self, x: ParityParts) -> ParityParts:
        """Changes columns and channels to the regular basis, applies x*sigmoid(1.702x), and changes back."""
        regular = self._change_parts_basis(x)
        return self._change_parts_basis(ParityParts(*(quick_gelu(part) for part in regular)))

    def _change_parts_basis(self, x: ParityParts) -> ParityParts:
        """Changes columns and channels to the regular basis. Both changes commute, so the map is its own inverse."""
        even, odd = self.columns.mix_columns(x.ee, x.eo), self.columns.mix_columns(x.oe, x.oo)
        (ee, oe), (eo, oo) = butterfly(even[0], odd[0]), butterfly(even[1], odd[1])
        return ParityParts(ee, eo, oe, oo)

    def forward(self, x: ParityParts) -> ParityParts:
        hidden = ParityParts(*(self.drop(part) for part in self.activate(self.fc1(x))))
        return ParityParts(*(self.drop(part) for part in self.fc2(hidden)))


class FlopResBlock(nn.Module):
    """timm's `ResBlock` on features of two parities (eq. 7).

    Shape: (B, N, C) -> (B, N, C). With `invariants_only` it returns the invariant features, (B, N, C/2).
    """

    def __init__(
        self,
        dim: int,
        columns: ColumnParity,
        mlp_ratio: float = 4,
        init_values: float = 1e-4,
        drop: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.columns = columns
        self.norm1 = BiparityAffine(dim, **dd)
        self.linear_tokens = TokenMixing(columns, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = BiparityAffine(dim, **dd)
        self.mlp_channels = BiparityMlp(dim, int(dim * mlp_ratio), columns, drop=drop, **dd)
        self.ls1 = nn.Parameter(init_values * torch.ones(dim, **dd))
        self.ls2 = nn.Parameter(init_values * torch.ones(dim, **dd))

    def forward(self, x: Tensor, invariants_only: bool = False) -> Tensor:
        parts = self.columns.split(x)
        parts = self._add(parts, self.linear_tokens(self.norm1(parts)).scaled(self.ls1))
        update = self.mlp_channels(self.norm2(parts)).scaled(self.ls2)
        if invariants_only:  # the compiler then drops half of the last product
            return parts.invariant + self.drop_path(update.invariant)
        return self.columns.join(self._add(parts, update))

    def _add(self, parts: ParityParts, update: ParityParts) -> ParityParts:
        """The residual connection. Stochastic depth drops all four parts of an image's update or none."""
        if isinstance(self.drop_path, DropPath):
            keep = self.drop_path(torch.ones_like(parts.ee[:, :1, :1]))
            update = ParityParts(*(keep * part for part in update))
        return ParityParts(*(part + change for part, change in zip(parts, update, strict=True)))
