"""Layers of a ResMLP that commutes with a group, on features with an irrep by channel and one by token.

Between the layers tokens are in the order of places (see `flopeq.layers.group.tokens`), and channels in irreps. Token
mixing changes tokens to irreps and back. With C2 the layers compute what those of `flopeq.layers.biparity` do, which
keep tokens in irreps, on the same weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.layers.activations import quick_gelu
from torch import Tensor, nn

from flopeq.backends.attached import may_use_weights
from flopeq.backends.onednn import linear_without_bias
from flopeq.groups import Group, Parts
from flopeq.layers.group.parts import describe_parts, multiplicities, split_scales
from flopeq.layers.group.tokens import GridTokens, InvariantConstants


def widen_scales(group: Group, scales: Tensor) -> Tensor:
    """Scales for all C channels from one for each occurrence of an irrep, because rows share their scales."""
    parts = zip(group.irreps, split_scales(group, scales), strict=True)
    return group.join(tuple(part if irrep.dim == 1 else part.expand(irrep.dim, -1) for irrep, part in parts))


def product_and_bias(layer: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """(W x, b) for a linear layer W, b, by a single call of the layer, or, in compiled code, from its weights.

    The layer acts on x and on zeros, whose result is b. Subtracting it is right for whatever is attached to the layer,
    such as an adapter, quantized weights or shards of the weights.

    Shape: (B, N, ..., in_features) -> (B, N, ..., out_features), and a bias that broadcasts.
    """
    if may_use_weights(layer):
        return linear_without_bias(layer, x), layer.bias
    y, bias = layer(torch.cat((x, torch.zeros_like(x[:, :1])), 1)).split([x.shape[1], 1], 1)
    return y - bias, bias.flatten(0, -2)[0]


class GroupGridAffine(nn.Module):
    """y = alpha * x + beta, with beta on the pairs of equal irreps only. It generalizes `BiparityAffine`.

    Shape: (B, N, C) -> (B, N, C), tokens in places.
    """

    def __init__(self, tokens: GridTokens, num_channels: int, device=None, dtype=None) -> None:
        super().__init__()
        self.group = tokens.group
        num_scales = sum(multiplicities(tokens.group, num_channels, "embed_dim"))
        self.alpha = nn.Parameter(torch.ones(1, 1, num_scales, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(1, 1, num_scales, device=device, dtype=dtype))
        self.constants = InvariantConstants(tokens, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        alpha = widen_scales(self.group, self.alpha.flatten())
        beta = self.group.join(self.constants(split_scales(self.group, self.beta.flatten())))
        return torch.addcmul(beta, alpha, x)


class GroupGridLinear(nn.Module):
    """Block diagonal linear map over channels, with a bias on each pair of equal irreps.

    It generalizes `BiparityLinear`.

    Shape: parts of (B, N, in_features), tokens in places -> parts of (B, N, out_features).
    Cost: that of `GroupLinear`.
    """

    def __init__(self, tokens: GridTokens, in_features: int, out_features: int, device=None, dtype=None) -> None:
        super().__init__()
        self.group, self.in_features, self.out_features = tokens.group, in_features, out_features
        inner = multiplicities(tokens.group, in_features, "in_features")
        outer = multiplicities(tokens.group, out_features, "out_features")
        for irrep, width, out_width in zip(tokens.group.irreps, inner, outer, strict=True):
            self.add_module(irrep.name, nn.Linear(width, out_width, device=device, dtype=dtype))
        self.constants = InvariantConstants(tokens, device, dtype)

    def forward(self, x: Parts) -> Parts:
        layers = [getattr(self, irrep.name) for irrep in self.group.irreps]
        products = [product_and_bias(layer, part) for layer, part in zip(layers, x, strict=True)]
        constants = self.constants([bias for _, bias in products])
        return tuple(product + constant for (product, _), constant in zip(products, constants, strict=True))

    def extra_repr(self) -> str:
        inner, outer = (describe_parts(self.group, width) for width in (self.in_features, self.out_features))
        return f"{inner} -> {outer}"


class GroupTokenMixing(nn.Module):
    """Block diagonal linear map over tokens, one block for each irrep. It generalizes `TokenMixing`.

    The bias of an irrep's tokens acts on channels of the same irrep, and on the same row. Irreps that the tokens of a
    small grid lack have no block.

    Shape: (B, N, C) -> (B, N, C), tokens in places.
    Cost: sum of d n^2 over the irreps and their tokens n, multiply-adds per channel: N^2/4 for C2 x C2 and 3 N^2/16 for
    D4 on large grids, against N^2 of nn.Linear.
    """

    def __init__(self, tokens: GridTokens, device=None, dtype=None) -> None:
        super().__init__()
        self.tokens, self.group = tokens, tokens.group
        for irrep, n in zip(self.group.irreps, tokens.multiplicities, strict=True):
            if n:
                self.add_module(irrep.name, nn.Linear(n, n, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.tokens.to_irreps(x))
        for index, irrep in enumerate(self.group.irreps):
            if self.tokens.multiplicities[index]:
                product, bias = _product_from_left(getattr(self, irrep.name), parts[index], irrep.dim)
                parts[index] = product + self._constant(index, bias, x.shape[-1])
        return self.tokens.from_irreps(tuple(parts))

    def _constant(self, index: int, bias: Tensor, num_channels: int) -> Tensor:
        """The bias on the channels of the same irrep and row, (n, C), or (2, n, C)."""
        copies, start = num_channels // self.group.order, 0
        for irrep in self.group.irreps[:index]:
            start += irrep.dim**2 * copies
        dim = self.group.irreps[index].dim
        rows = []
        for row in range(dim):
            left = start + row * dim * copies
            block = bias[:, None].expand(-1, dim * copies)
            rows.append(F.pad(block, (left, num_channels - left - dim * copies)))
        return rows[0] if dim == 1 else torch.stack(rows)


def _product_from_left(layer: nn.Linear, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(W x, b) for the tokens of an irrep, (B, n, C), or (B, dim, n, C)."""
    if may_use_weights(layer):  # needs no transpose before and after
        rows = (x.shape[0],) if dim == 1 else (x.shape[0], dim)
        return layer.weight.expand(*rows, -1, -1) @ x, layer.bias
    by_channel = x.mT if dim == 1 else x.mT.flatten(1, 2)
    y, bias = product_and_bias(layer, by_channel)
    return (y if dim == 1 else y.unflatten(1, (dim, -1))).mT, bias


class GroupGridMlp(nn.Module):
    """Channel MLP. The activation x*sigmoid(1.702x) acts where the group permutes channels and places.

    It generalizes `BiparityMlp`.

    Shape: parts of (B, N, C) -> parts of (B, N, C), tokens in places.
    """

    def __init__(
        self, tokens: GridTokens, dim: int, hidden_features: int, drop: float = 0.0, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.group = tokens.group
        self.fc1 = GroupGridLinear(tokens, dim, hidden_features, device, dtype)
        self.fc2 = GroupGridLinear(tokens, hidden_features, dim, device, dtype)
        self.drop = nn.Dropout(drop)

    def activate(self, x: Parts) -> Parts:
        """Changes channels to the regular basis, applies x*sigmoid(1.702x), and changes back."""
        return self.group.from_regular([quick_gelu(part) for part in self.group.to_regular(x)])

    def forward(self, x: Parts) -> Parts:
        hidden = tuple(self.drop(part) for part in self.activate(self.fc1(x)))
        return tuple(self.drop(part) for part in self.fc2(hidden))


class GroupResBlock(nn.Module):
    """timm's `ResBlock` on features with irreps by channel and by token. It generalizes `FlopResBlock`.

    Shape: (B, N, C) -> (B, N, C), tokens in places.
    """

    def __init__(
        self,
        tokens: GridTokens,
        dim: int,
        mlp_ratio: float = 4,
        init_values: float = 1e-4,
        drop: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.group = tokens.group
        num_scales = sum(multiplicities(tokens.group, dim, "embed_dim"))
        self.norm1 = GroupGridAffine(tokens, dim, **dd)
        self.linear_tokens = GroupTokenMixing(tokens, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = GroupGridAffine(tokens, dim, **dd)
        self.mlp_channels = GroupGridMlp(tokens, dim, int(dim * mlp_ratio), drop=drop, **dd)
        self.ls1 = nn.Parameter(init_values * torch.ones(num_scales, **dd))
        self.ls2 = nn.Parameter(init_values * torch.ones(num_scales, **dd))

    def forward(self, x: Tensor) -> Tensor:
        ls1, ls2 = (widen_scales(self.group, scales) for scales in (self.ls1, self.ls2))
        x = x + self.drop_path(ls1 * self.linear_tokens(self.norm1(x)))
        update = self.group.join(self.mlp_channels(self.group.split(self.norm2(x))))
        return x + self.drop_path(ls2 * update)
