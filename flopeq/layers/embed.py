"""Patch and position embeddings."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from timm.layers import PatchEmbed, resample_abs_pos_embed, resample_patch_embed
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from flopeq.irreps import half, join, split
from flopeq.layers.conv import FlopPatchConv, check_patch_width, mirror_kernel, pair

torch.fx.wrap("rearrange")  # einops cannot be traced symbolically


class FlopPatchEmbed(PatchEmbed):
    """timm's `PatchEmbed` with a `FlopPatchConv`. Tokens are in raster order.

    Shape: (B, in_chans, H, W) -> (B, N, C), or (B, C, H, W) with flatten=False.
    Raises: ValueError as `FlopPatchConv` does, and for `dynamic_img_pad`, which pads one side only.
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
        """Changes the image or the patch size. Kernels are resampled as in timm and stay symmetric."""
        if patch_size is not None and pair(patch_size) != self.patch_size:
            self.patch_size = pair(patch_size)
            self.proj.set_kernel(resample_patch_embed(self.proj.kernel(), list(self.patch_size)))
        self.img_size, self.grid_size, self.num_patches = self._init_img_size(img_size or self.img_size)
        check_patch_width(pair(self.img_size)[1], self.patch_size[1])


class FlopPosEmbed(nn.Module):
    """Position embedding, symmetric about the middle column in even channels, antisymmetric in odd ones (sec. 4.2).

    The parameters are the left part: `even` (H, ceil(W/2), C/2) and `odd` (H, floor(W/2), C/2). Odd channels are zero
    in the middle column of an odd grid.

    Shape: () -> (1, H*W, C), in raster order.
    """

    def __init__(self, grid_size: tuple[int, int], num_channels: int, device=None, dtype=None) -> None:
        super().__init__()
        height, width = grid_size
        channels = half(num_channels, "embed_dim")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grid_size = height, width
        self.even = nn.Parameter(torch.empty(height, width - width // 2, channels, **dd))
        self.odd = nn.Parameter(torch.empty(height, width // 2, channels, **dd))
        self.init_weights()

    def init_weights(self) -> None:
        """Initializes the embedding as timm does, from a truncated normal with std 0.02."""
        trunc_normal_(self.even, std=0.02)
        trunc_normal_(self.odd, std=0.02)

    reset_parameters = init_weights  # torch's name, which timm calls for weight_init="reset"

    def forward(self, grid_size: tuple[int, int] | None = None) -> Tensor:
        """The whole embedding. For another grid it is resampled as in timm."""
        width = self.grid_size[1]
        even, odd = (rearrange(part, "H W C -> C H W") for part in (self.even, self.odd))
        whole = join(mirror_kernel(even, width, +1), mirror_kernel(odd, width, -1), dim=0)
        tokens = rearrange(whole, "C H W -> 1 (H W) C")
        return tokens if grid_size is None else resample_tokens(tokens, grid_size, self.grid_size)

    @torch.no_grad()
    def resized(self, grid_size: tuple[int, int]) -> FlopPosEmbed:
        """A new embedding, resampled to another grid."""
        height, width = grid_size
        even, odd = split(rearrange(self(grid_size), "1 (H W) C -> H W C", H=height))
        other = FlopPosEmbed(grid_size, 2 * even.shape[-1], device=even.device, dtype=even.dtype)
        other.even.copy_(even[:, : width - width // 2])
        other.odd.copy_(odd[:, : width // 2])
        return other

    def extra_repr(self) -> str:
        return f"grid={self.grid_size}, {self.even.shape[-1]}e+{self.odd.shape[-1]}o"


@torch.fx.wrap
def resample_tokens(tokens: Tensor, grid_size: tuple[int, int], old_grid_size: tuple[int, int]) -> Tensor:
    """Position embeddings (1, N, C) resampled to another grid, as in timm."""
    if grid_size == old_grid_size:
        return tokens
    return resample_abs_pos_embed(tokens, list(grid_size), list(old_grid_size), num_prefix_tokens=0)
