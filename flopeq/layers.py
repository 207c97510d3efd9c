"""Layers that commute with the flop: each takes and gives channels even then odd (see `irreps`).

Each layer's law is written in `on_halves`, which takes and gives the two halves apart; `forward` splits and joins.
Blocks chain `on_halves`, because joining halves that are split again costs a copy.

Shape suffixes: B batch, N tokens, C channels, H W grid, h heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import PatchEmbed, resample_abs_pos_embed, resample_patch_embed, use_fused_attn
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from flopeq.depthwise import depthwise_conv2d
from flopeq.irreps import SQRT_HALF, butterfly, half, join, split
from flopeq.products import Linear

Halves = tuple[Tensor, Tensor]
"""Features whose even and odd halves lie apart."""


class FlopLinear(nn.Module):
    """Equivariant linear map, block diagonal by Schur's lemma: y = (W_even x_even + b) (+) (W_odd x_odd).

    A bias on the odd half would not survive the flop, so there is none (Bökman et al. 2025, sec. 3.1, eq. 2).

    Shape: (..., in_features) -> (..., out_features), each axis even then odd.
    Cost: in*out/2 multiply-adds per token, half of nn.Linear.
    Raises: ValueError if either width does not split into two halves.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, outer = half(in_features, "in_features"), half(out_features, "out_features")
        self.even = Linear(inner, outer, bias=bias, **dd)
        self.odd = Linear(inner, outer, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return join(*self.on_halves(*split(x)))

    def on_halves(self, even: Tensor, odd: Tensor) -> Halves:
        """The same on halves that lie apart."""
        return self.even(even), self.odd(odd)

    def extra_repr(self) -> str:
        inner, outer = self.even.in_features, self.even.out_features
        return f"{inner}e+{inner}o -> {outer}e+{outer}o"


class FlopLayerNorm(nn.Module):
    """y = w * (x - mean of its half) / sqrt((var_even + var_odd + eps) / 2), plus a bias on the even half.

    The norm of neither half changes under the flop (sec. 3.3). Subtracting the mean of each half keeps both, and
    they share one scale. As in the authors' code eps lies under the halving, so that its effect is eps/2.

    Shape: (..., C) -> (..., C). Statistics are taken in float32 at least.
    Raises: ValueError if C does not split into two halves.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(half(num_channels, "num_channels"), device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return join(*self.on_halves(*split(x)))

    def on_halves(self, even: Tensor, odd: Tensor) -> Halves:
        """The same on halves that lie apart."""
        dtype = even.dtype
        even, odd = (part.to(torch.promote_types(dtype, torch.float32)) for part in (even, odd))
        # Centred once and used twice, which compiles into fewer passes over the features than var_mean.
        even, odd = (part - part.mean(-1, keepdim=True) for part in (even, odd))
        var_even, var_odd = (part.square().mean(-1, keepdim=True) for part in (even, odd))
        scale = 1 / (SQRT_HALF * torch.sqrt(var_even + var_odd + self.eps))
        w_even, w_odd = split(self.weight)
        return (even * scale * w_even + self.bias).to(dtype), (odd * scale * w_odd).to(dtype)

    def extra_repr(self) -> str:
        return f"{len(self.bias)}e+{len(self.bias)}o, eps={self.eps}"


class FlopGELU(nn.Module):
    """GELU in the regular basis, where the flop is a permutation: change basis, activate, change back (eq. 3).

    Shape: (..., C) -> (..., C).
    """

    def forward(self, x: Tensor) -> Tensor:
        return join(*self.on_halves(*split(x)))

    def on_halves(self, even: Tensor, odd: Tensor) -> Halves:
        """The same on halves that lie apart."""
        a, b = butterfly(even, odd)
        return butterfly(F.gelu(a), F.gelu(b))


class FlopMlp(nn.Module):
    """Two equivariant linear maps with an equivariant activation between them; stands in for timm's `Mlp`.

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
        """The same on halves that lie apart."""
        even, odd = self.fc2.on_halves(*self.hidden(even, odd))
        return self.drop2(even), self.drop2(odd)

    def even_half(self, even: Tensor, odd: Tensor) -> Tensor:
        """The result's even half alone."""
        even, _ = self.hidden(even, odd)
        return self.drop2(self.fc2.even(even))

    def hidden(self, even: Tensor, odd: Tensor) -> Halves:
        """What lies between the two linear maps."""
        even, odd = self.act.on_halves(*self.fc1.on_halves(even, odd))
        even, odd = self.drop1(even), self.drop1(odd)
        return (even, odd) if isinstance(self.norm, nn.Identity) else self.norm.on_halves(even, odd)


class FlopAttention(nn.Module):
    """Self-attention whose scores are invariant: q.k = q_even.k_even + q_odd.k_odd (eq. 4); stands in for timm's.

    Every head holds even and odd channels in equal number.

    Shape: (B, N, C) -> (B, N, C).
    Cost: 2 C^2 multiply-adds per token for the projections, half of the ordinary ones; the attention's own are equal.
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

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return join(*self.on_halves(*split(x), attn_mask=attn_mask, is_causal=is_causal))

    def on_halves(
        self, even: Tensor, odd: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Halves:
        """The same on halves that lie apart."""
        if is_causal:
            raise ValueError("a causal mask tells left from right, so the attention would not commute with the flop")
        # Halves go straight from the products to their places in the heads, and their gradients straight back.
        thirds = (
            rearrange(part, "B N (k h d) -> B N k h d", k=3, h=self.num_heads).unbind(2)
            for part in self.qkv.on_halves(even, odd)
        )
        q, k, v = (join(*halves).transpose(1, 2) for halves in zip(*thirds, strict=True))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            x_BhNd = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        else:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            if attn_mask is not None:
                scores = scores + attn_mask
            x_BhNd = self.attn_drop(scores.softmax(dim=-1)) @ v
        even, odd = (rearrange(part, "B h N d -> B N (h d)") for part in split(x_BhNd))
        if not isinstance(self.norm, nn.Identity):
            even, odd = self.norm.on_halves(even, odd)
        even, odd = self.proj.on_halves(even, odd)
        return self.proj_drop(even), self.proj_drop(odd)

    def extra_repr(self) -> str:
        return f"{self.num_heads} heads of {self.head_dim // 2}e+{self.head_dim // 2}o"


def residual(x: Halves, update: Halves, scale: Tensor | None, drop_path: nn.Module) -> Halves:
    """x + drop_path(scale * update) on halves that lie apart; `scale` is a vector (C,) over channels, None for 1.

    Stochastic depth drops both halves of an image's update, or none.
    """
    even, odd = update
    if scale is not None:
        scale_even, scale_odd = split(scale)
        even, odd = scale_even * even, scale_odd * odd
    if not isinstance(drop_path, nn.Identity):
        keep = drop_path(even.new_ones(len(even), *(1,) * (even.ndim - 1)))
        even, odd = keep * even, keep * odd
    return x[0] + even, x[1] + odd


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size that is given as one number or as two."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def mirrored(half_kernel: Tensor, width: int, sign: int) -> Tensor:
    """A (anti)symmetric kernel from its left part: (..., kh, ceil(width/2)) -> (..., kh, width) for sign +1.

    For sign -1 the part has floor(width/2) columns: the middle column of an antisymmetric kernel is zero.
    """
    pairs = width // 2
    right = half_kernel[..., :pairs].flip(-1)
    if sign > 0:
        return torch.cat((half_kernel, right), dim=-1)
    middle = half_kernel.new_zeros((*half_kernel.shape[:-1], width % 2))
    return torch.cat((half_kernel, middle, -right), dim=-1)


class FlopPatchConv(nn.Module):
    """Convolution by symmetric kernels, giving even channels, and antisymmetric ones, giving odd (sec. 3.2).

    Kernel and stride are equal, so the image is cut into patches. `scale` multiplies the result: the authors'
    ViT and ConvNeXt have 1/sqrt 2 there.

    Shape: (B, in_channels, H, W) -> (B, out_channels, H/kh, W/kw).
    Raises: ValueError if out_channels is odd, or for an image whose width the patches do not fill: the columns left
    over on one side would break the symmetry.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        bias: bool = True,
        scale: float = 1.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        outer = half(out_channels, "embed_dim")
        height, width = self.kernel_size = pair(kernel_size)
        self.in_channels, self.out_channels, self.scale = in_channels, out_channels, scale
        self.even = nn.Parameter(torch.empty(outer, in_channels, height, width - width // 2, **dd))
        self.odd = nn.Parameter(torch.empty(outer, in_channels, height, width // 2, **dd))
        self.bias = nn.Parameter(torch.zeros(outer, **dd)) if bias else None
        self.init_weights()

    def init_weights(self) -> None:
        """Draws both halves from nn.Conv2d's own distribution, for the fan-in of the whole kernel."""
        bound = (self.in_channels * self.kernel_size[0] * self.kernel_size[1]) ** -0.5
        nn.init.uniform_(self.even, -bound, bound)
        nn.init.uniform_(self.odd, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def kernel(self) -> Tensor:
        """The whole kernel, (out_channels, in_channels, kh, kw)."""
        width = self.kernel_size[1]
        return join(mirrored(self.even, width, +1), mirrored(self.odd, width, -1), dim=0)

    @torch.no_grad()
    def set_kernel(self, kernel: Tensor) -> None:
        """Takes the left parts of a whole kernel, whatever its size, as the new parameters."""
        self.kernel_size = pair(kernel.shape[-2:])
        width = self.kernel_size[1]
        even, odd = split(kernel, dim=0)
        self.even = nn.Parameter(even[..., : width - width // 2].clone(), requires_grad=self.even.requires_grad)
        self.odd = nn.Parameter(odd[..., : width // 2].clone(), requires_grad=self.odd.requires_grad)

    def forward(self, image: Tensor) -> Tensor:
        check_patch_width(image.shape[-1], self.kernel_size[1])
        bias = None if self.bias is None else F.pad(self.bias, (0, len(self.bias))) * self.scale
        return F.conv2d(image, self.kernel() * self.scale, bias, stride=self.kernel_size)

    def extra_repr(self) -> str:
        outer = self.out_channels // 2
        return f"{self.in_channels} -> {outer}e+{outer}o, kernel_size={self.kernel_size}, scale={self.scale:.4g}"


def check_patch_width(image_width: int, patch_width: int) -> None:
    """Raises ValueError when patches do not fill an image's width."""
    if image_width % patch_width:
        raise ValueError(
            f"an image of width {image_width} is not filled by patches of width {patch_width}: the columns left over "
            f"on the right would break the mirror symmetry; use a multiple of {patch_width}"
        )


class FlopPatchEmbed(PatchEmbed):
    """timm's patch embedding with a `FlopPatchConv`; tokens stay in raster order.

    Shape: (B, in_chans, H, W) -> (B, N, C), or (B, C, H, W) with flatten=False.
    Raises: ValueError as `FlopPatchConv` does, and for `dynamic_img_pad`, which pads on one side.
    """

    proj: FlopPatchConv  # pyright: ignore[reportIncompatibleVariableOverride]
    patch_size: tuple[int, int]

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        scale: float = 1.0,
        dynamic_img_pad: bool = False,
        device=None,
        dtype=None,
        **kwargs,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if dynamic_img_pad:
            raise ValueError("dynamic_img_pad pads on the right only, which breaks the mirror symmetry")
        if img_size is not None:
            check_patch_width(pair(img_size)[1], pair(patch_size)[1])
        super().__init__(img_size, patch_size, in_chans, embed_dim, bias=bias, **dd, **kwargs)  # pyright: ignore[reportArgumentType]
        self.proj = FlopPatchConv(in_chans, embed_dim, patch_size, bias=bias, scale=scale, **dd)

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """Changes the image or the patch size; kernels are resampled as timm does, and stay symmetric."""
        if patch_size is not None and pair(patch_size) != self.patch_size:
            self.patch_size = pair(patch_size)
            self.proj.set_kernel(resample_patch_embed(self.proj.kernel(), list(self.patch_size)))
        self.img_size, self.grid_size, self.num_patches = self._init_img_size(img_size or self.img_size)
        check_patch_width(pair(self.img_size)[1], self.patch_size[1])


class FlopPosEmbed(nn.Module):
    """Position embedding, symmetric about the middle column in even channels, antisymmetric in odd (sec. 4.2).

    Only the left part is stored: `even` (H, ceil(W/2), C/2) and `odd` (H, floor(W/2), C/2), since in the middle
    column of an odd grid odd channels vanish.

    Shape: () -> (1, H*W, C), in raster order.
    """

    def __init__(self, grid_size: tuple[int, int], num_channels: int, device=None, dtype=None) -> None:
        super().__init__()
        height, width = grid_size
        channels = half(num_channels, "embed_dim")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.even = nn.Parameter(torch.empty(height, width - width // 2, channels, **dd))
        self.odd = nn.Parameter(torch.empty(height, width // 2, channels, **dd))
        self.init_weights()

    def init_weights(self) -> None:
        """timm's distribution of position embeddings."""
        trunc_normal_(self.even, std=0.02)
        trunc_normal_(self.odd, std=0.02)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.even.shape[0], self.even.shape[1] + self.odd.shape[1]

    def forward(self, grid_size: tuple[int, int] | None = None) -> Tensor:
        """The whole embedding, resampled as timm does when another grid is asked for."""
        width = self.grid_size[1]
        even, odd = (rearrange(part, "H W C -> C H W") for part in (self.even, self.odd))
        whole = join(mirrored(even, width, +1), mirrored(odd, width, -1), dim=0)
        tokens = rearrange(whole, "C H W -> 1 (H W) C")
        if grid_size is None or grid_size == self.grid_size:
            return tokens
        return resample_abs_pos_embed(tokens, list(grid_size), list(self.grid_size), num_prefix_tokens=0)

    @torch.no_grad()
    def resized(self, grid_size: tuple[int, int]) -> FlopPosEmbed:
        """The same embedding on another grid."""
        height, width = grid_size
        even, odd = split(rearrange(self(grid_size), "1 (H W) C -> H W C", H=height))
        other = FlopPosEmbed(grid_size, 2 * even.shape[-1], device=even.device, dtype=even.dtype)
        other.even.copy_(even[:, : width - width // 2])
        other.odd.copy_(odd[:, : width // 2])
        return other

    def extra_repr(self) -> str:
        return f"grid={self.grid_size}, {self.even.shape[-1]}e+{self.odd.shape[-1]}o"


class FlopDepthwiseConv(nn.Module):
    """Depthwise convolution by symmetric and antisymmetric kernels in turn (sec. 4.3).

    Of the even channels the first half meets symmetric kernels and stays even, the second half antisymmetric ones and
    becomes odd; of the odd channels the first half becomes even, the second stays odd. Only even results have a bias.

    Shape: (B, C, H, W) -> (B, C, H, W).
    Cost: kernel_size^2 multiply-adds per channel and place, as for nn.Conv2d (sec. 4.4).
    Raises: ValueError if C is not a multiple of 4 or the kernel size is even.
    """

    def __init__(self, num_channels: int, kernel_size: int = 7, device=None, dtype=None) -> None:
        super().__init__()
        if num_channels % 4:
            raise ValueError(
                f"embed_dim={num_channels} does not split into four kinds of depthwise kernels: use a multiple of 4"
            )
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} has no middle column: use an odd size")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        quarter = num_channels // 4
        self.num_channels, self.kernel_size = num_channels, kernel_size

        def left_part(columns: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(quarter, 1, kernel_size, columns, **dd))

        self.even_to_even = left_part(kernel_size // 2 + 1)
        self.even_to_odd = left_part(kernel_size // 2)
        self.odd_to_even = left_part(kernel_size // 2)
        self.odd_to_odd = left_part(kernel_size // 2 + 1)
        self.bias = nn.Parameter(torch.zeros(2 * quarter, **dd))
        self.init_weights()

    def init_weights(self) -> None:
        """ConvNeXt's distribution of convolution weights."""
        for part in (self.even_to_even, self.even_to_odd, self.odd_to_even, self.odd_to_odd):
            trunc_normal_(part, std=0.02)
        nn.init.zeros_(self.bias)

    def kernel(self) -> Tensor:
        """The whole kernel, (C, 1, kernel_size, kernel_size), by source and target: ee, eo, oe, oo."""
        pairs = self.kernel_size // 2
        ee, eo, oe, oo = self.even_to_even, self.even_to_odd, self.odd_to_even, self.odd_to_odd
        # Column by column for all four kinds at once, as mirroring each kind by itself takes twice the time.
        no_middle = torch.zeros_like(eo[..., :1])
        left = torch.cat((ee[..., :pairs], eo, oe, oo[..., :pairs]))
        middle = torch.cat((ee[..., pairs:], no_middle, no_middle, oo[..., pairs:]))
        right = torch.cat((ee[..., :pairs], -eo, -oe, oo[..., :pairs])).flip(-1)
        return torch.cat((left, middle, right), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        bias_even, bias_odd_to_even = self.bias.chunk(2)
        zeros = torch.zeros_like(bias_even)
        bias = torch.cat((bias_even, zeros, bias_odd_to_even, zeros))
        y = depthwise_conv2d(x, self.kernel(), bias, self.kernel_size // 2, self.num_channels)
        # Channels last while their order changes, which is how the block's norm and products read them.
        y = rearrange(y.permute(0, 2, 3, 1), "B H W (source target C) -> B H W (target source C)", source=2, target=2)
        return y.permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        channels = self.num_channels // 2
        return f"{channels}e+{channels}o, kernel_size={self.kernel_size}"
