"""Alternative implementations of the block of E(ViT) on a GPU, with the same weights and the same result.

`batched`: LayerNorm and residuals on joined halves, and one batched product for both halves.
`triton`: the same with the kernels of `gpu_products`, which access the channels of attention heads in place and apply
`FlopGELU` before they store the result.

Shape suffixes as in `flopeq.layers`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from gpu_products import paired_gelu_linear, paired_linear
from torch import Tensor

from flopeq.irreps import SQRT_HALF
from flopeq.layers.linear import FlopLinear
from flopeq.layers.norm import FlopLayerNorm
from flopeq.models.vit import FlopBlock


def batched(self: FlopBlock, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Uses batched products of cuBLAS. The kernel that reads a product adds its bias."""
    attn, mlp = self.attn, self.mlp
    B, N, C = x.shape
    h, d_half, dtype = attn.num_heads, C // attn.num_heads // 2, autocast_dtype(x)
    y = batched_product(halves_first(joined_norm(x, self.norm1)), attn.qkv, dtype)
    even, odd = y[0] + attn.qkv.even.bias.to(dtype), y[1]
    heads = torch.stack((even.view(B, N, 3 * h, d_half), odd.view(B, N, 3 * h, d_half)), dim=3)
    q, k, v = (part.transpose(1, 2) for part in heads.view(B, N, 3, h, 2 * d_half).unbind(2))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    y = y.reshape(B * N, h, 2, d_half).permute(2, 0, 1, 3).reshape(2, B * N, C // 2)
    y = batched_product(y, attn.proj, dtype)
    y = torch.cat((y[0] + attn.proj.even.bias.to(dtype), y[1]), -1).view(B, N, C)
    x = x + y * self.ls1.gamma
    y = batched_product(halves_first(joined_norm(x, self.norm2)), mlp.fc1, dtype)
    y = torch.stack(mlp.act((y[0] + mlp.fc1.even.bias.to(dtype), y[1])))
    y = batched_product(y, mlp.fc2, dtype)
    y = torch.cat((y[0] + mlp.fc2.even.bias.to(dtype), y[1]), -1).view(B, N, C)
    return x + y * self.ls2.gamma


def by_triton(self: FlopBlock, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """All four products by `gpu_products`."""
    attn, mlp = self.attn, self.mlp
    B, N, C = x.shape
    h, d_half, dtype = attn.num_heads, C // attn.num_heads // 2, autocast_dtype(x)
    y = joined_norm(x, self.norm1).view(B * N, C).to(dtype)
    heads = paired_linear(y, stacked_weights(attn.qkv, dtype), attn.qkv.even.bias.to(dtype), 0, d_half)
    q, k, v = (part.transpose(1, 2) for part in heads.view(B, N, 3, h, 2 * d_half).unbind(2))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B * N, C)
    y = paired_linear(y, stacked_weights(attn.proj, dtype), attn.proj.even.bias.to(dtype), d_half, 0)
    x = x + y.view(B, N, C) * self.ls1.gamma
    y = joined_norm(x, self.norm2).view(B * N, C).to(dtype)
    y = paired_gelu_linear(y, stacked_weights(mlp.fc1, dtype), mlp.fc1.even.bias.to(dtype))
    y = paired_linear(y, stacked_weights(mlp.fc2, dtype), mlp.fc2.even.bias.to(dtype), 0, 0)
    return x + y.view(B, N, C) * self.ls2.gamma


BLOCKS: dict[str, Callable[..., Tensor]] = {"library": FlopBlock.forward, "batched": batched, "triton": by_triton}


def use_block(name: str) -> None:
    """Computes every `FlopBlock` by this variant; `library` is flopeq's own."""
    FlopBlock.forward = BLOCKS[name]


def joined_norm(x: Tensor, norm: FlopLayerNorm) -> Tensor:
    """`FlopLayerNorm` on joined halves, whose reductions run over all channels, so that they fuse into one kernel."""
    dtype, C = x.dtype, x.shape[-1]
    x = x.to(torch.promote_types(dtype, torch.float32))
    is_even = torch.arange(C, device=x.device) < C // 2
    mean_even = torch.where(is_even, x, 0.0).sum(-1, keepdim=True) * (2 / C)
    mean_odd = torch.where(is_even, 0.0, x).sum(-1, keepdim=True) * (2 / C)
    x = x - torch.where(is_even, mean_even, mean_odd)
    scale = 1 / (SQRT_HALF * torch.sqrt(x.square().sum(-1, keepdim=True) * (2 / C) + norm.eps))
    return (x * scale * norm.weight + F.pad(norm.bias, (0, C // 2))).to(dtype)


def stacked_weights(linear: FlopLinear, dtype: torch.dtype) -> Tensor:
    """Weights of both halves, (2, out_features/2, in_features/2)."""
    return torch.stack((linear.even.weight, linear.odd.weight)).to(dtype)


def batched_product(x_2MK: Tensor, linear: FlopLinear, dtype: torch.dtype) -> Tensor:
    """Both products without the bias: (2, M, K) -> (2, M, N)."""
    return torch.bmm(x_2MK.to(dtype), stacked_weights(linear, dtype).transpose(1, 2))


def halves_first(x: Tensor) -> Tensor:
    """A view (2, B*N, C/2) of joined halves (B, N, C)."""
    B, N, C = x.shape
    return x.view(B * N, 2, C // 2).transpose(0, 1)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products."""
    enabled = torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if enabled else x.dtype
