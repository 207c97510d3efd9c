"""Self-attention with invariant scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from torch import Tensor, nn
from torch.fx.node import has_side_effect

from flopeq.irreps import join, split
from flopeq.layers.halves import Halves, call_unless_identity, from_halves, to_halves
from flopeq.layers.linear import FlopLinear
from flopeq.layers.norm import FlopLayerNorm


@has_side_effect
@torch.fx.wrap
def check_not_causal(is_causal: bool) -> None:
    """Raises ValueError for a causal mask."""
    if is_causal:
        raise ValueError("a causal mask distinguishes left from right: such attention does not commute with the flop")


class HeadAttention(nn.Module):
    """What happens inside the heads, which layers of every group share."""

    fused_attn: bool
    attn_drop: nn.Dropout
    head_dim: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
        """softmax(q k^T / sqrt d + mask) v with dropout of the attention weights. Shape: (B, h, N, d) -> the same."""
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        if attn_mask is not None:
            scores = scores + attn_mask
        return self.attn_drop(scores.softmax(dim=-1)) @ v


class FlopAttention(HeadAttention):
    """Self-attention with invariant scores: q.k = q_even.k_even + q_odd.k_odd (eq. 4).

    It replaces timm's `Attention`. Every head has as many even channels as odd ones.

    Shape: (B, N, C) -> (B, N, C); a pair of halves gives a pair.
    Cost: 2 C^2 multiply-adds per token for the projections, half of ordinary attention; the rest costs the same.
    Raises: ValueError if a head's width does not split into two halves, or for a causal mask, which is not symmetric.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., FlopLayerNorm] = FlopLayerNorm,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if dim % (2 * num_heads):
            raise ValueError(
                f"embed_dim={dim} does not give each of {num_heads} heads an even and an odd half: "
                f"use a multiple of {2 * num_heads}"
            )
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.fused_attn = use_fused_attn()
        self.qkv = FlopLinear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.q_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(dim, **dd) if scale_norm else nn.Identity()
        self.proj = FlopLinear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor | Halves, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor | Halves:
        check_not_causal(is_causal)
        even, odd = (part.unflatten(-1, (3, self.num_heads, -1)) for part in self.qkv(to_halves(x)))
        q_even, k_even, v_even = even.unbind(2)
        q_odd, k_odd, v_odd = odd.unbind(2)
        # Writes the halves directly into the heads. Their gradients take the same way back, without another copy.
        thirds = (q_even, q_odd), (k_even, k_odd), (v_even, v_odd)
        q, k, v = (join(*halves).transpose(1, 2) for halves in thirds)
        q, k = self.q_norm(q), self.k_norm(k)
        x_BhNd = self.attend(q, k, v, attn_mask)
        even, odd = (part.transpose(1, 2).flatten(2) for part in split(x_BhNd))
        even, odd = self.proj(call_unless_identity(self.norm, (even, odd)))
        return from_halves((self.proj_drop(even), self.proj_drop(odd)), like=x)

    def extra_repr(self) -> str:
        return f"{self.num_heads} heads of {self.head_dim // 2}e+{self.head_dim // 2}o"
