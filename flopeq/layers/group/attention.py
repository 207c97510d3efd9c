"""Self-attention with invariant scores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import use_fused_attn
from torch import Tensor, nn

from flopeq.groups import Group, Parts
from flopeq.layers.attention import HeadAttention, check_not_causal
from flopeq.layers.group.linear import GroupLinear
from flopeq.layers.group.norm import GroupLayerNorm
from flopeq.layers.group.parts import describe_parts, from_parts, to_parts
from flopeq.layers.halves import call_unless_identity

torch.fx.wrap("check_not_causal")  # a wrapped function is known in its own module only


class GroupAttention(HeadAttention):
    """Self-attention with invariant scores: q.k is the sum of the products over all irreps and rows.

    Every head holds all irreps in the proportion of the features.

    Shape: (B, N, C) -> (B, N, C); a tuple of parts gives a tuple.
    Cost: that of its `GroupLinear`s, C -> 3C and C -> C; the rest costs as much as in ordinary attention.
    Raises: ValueError if C is not a multiple of |G| num_heads, or for a causal mask, which is not symmetric.
    """

    def __init__(
        self,
        group: Group,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if dim % (group.order * num_heads):
            raise ValueError(
                f"embed_dim={dim} does not give each of {num_heads} heads {group.order} equal parts, one for each "
                f"symmetry of {group.name}: use a multiple of {group.order * num_heads}"
            )
        norm_layer = norm_layer or partial(GroupLayerNorm, group)
        self.group = group
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.fused_attn = use_fused_attn()
        self.qkv = GroupLinear(group, dim, 3 * dim, bias=qkv_bias, **dd)
        self.q_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(dim, **dd) if scale_norm else nn.Identity()
        self.proj = GroupLinear(group, dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor | Parts, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor | Parts:
        check_not_causal(is_causal)
        parts = self.qkv(to_parts(self.group, x))
        rows = [
            row.unflatten(-1, (3, self.num_heads, -1))
            for irrep, part in zip(self.group.irreps, parts, strict=True)
            for row in ([part] if irrep.dim == 1 else [part[..., i, :] for i in range(irrep.dim)])
        ]
        # Writes the rows directly into the heads. Their gradients take the same way back, without another copy.
        q, k, v = (torch.cat([row[:, :, third] for row in rows], -1).transpose(1, 2) for third in range(3))
        q, k = self.q_norm(q), self.k_norm(k)
        x_BhNd = self.attend(q, k, v, attn_mask)
        heads = zip(self.group.irreps, self.group.split(x_BhNd), strict=True)
        # (B, h, N, d/|G|) -> (B, N, C/|G|), and (B, h, N, 2, d/4) -> (B, N, 2, C/4)
        parts = tuple(part.movedim(1, 2 if irrep.dim == 1 else 3).flatten(-2) for irrep, part in heads)
        parts = self.proj(call_unless_identity(self.norm, parts))
        return from_parts(self.group, tuple(self.proj_drop(part) for part in parts), like=x)

    def extra_repr(self) -> str:
        return f"{self.num_heads} heads of {describe_parts(self.group, self.head_dim)}"
