"""Convolutions with symmetric and antisymmetric kernels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers.weight_init import trunc_normal_
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.fx.node import has_side_effect

from flopeq.backends.depthwise import depthwise_conv2d
from flopeq.irreps import half, join, split

_logger = logging.getLogger(__name__)

torch.fx.wrap("rearrange")  # einops cannot be traced symbolically


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size given as one number or as two."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def mirror_kernel(half_kernel: Tensor, width: int, sign: int) -> Tensor:
    """Completes a kernel from its left part. It is symmetric for sign +1 and antisymmetric for sign -1.

    Shape: (..., kh, ceil(width/2)) -> (..., kh, width) for sign +1. For sign -1 the left part has floor(width/2)
    columns, because the middle column of an antisymmetric kernel is zero.
    """
    right = half_kernel[..., : width // 2].flip(-1)
    if sign > 0:
        return torch.cat((half_kernel, right), dim=-1)
    return torch.cat((F.pad(half_kernel, (0, width % 2)), -right), dim=-1)


class FlopPatchConv(nn.Module):
    """Convolution with symmetric kernels for even channels and antisymmetric kernels for odd channels (sec. 3.2).

    The stride equals the kernel size, so the layer embeds patches. `scale` multiplies the result; the authors use
    1/sqrt 2 in the ViT and the ConvNeXt. `load_state_dict` adapts kernels of another number of input channels as
    timm's `adapt_input_conv` does.

    Shape: (B, in_channels, H, W) -> (B, out_channels, H/kh, W/kw).
    Raises: ValueError if out_channels is odd, or if the image width is not a multiple of the patch width, because the
    remaining columns on one side would break the symmetry.
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
        """Initializes both halves from the distribution of nn.Conv2d, with the fan-in of the whole kernel."""
        bound = (self.in_channels * self.kernel_size[0] * self.kernel_size[1]) ** -0.5
        nn.init.uniform_(self.even, -bound, bound)
        nn.init.uniform_(self.odd, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    reset_parameters = init_weights  # torch's name, which timm calls for weight_init="reset"

    def kernel(self) -> Tensor:
        """The whole kernel, (out_channels, in_channels, kh, kw)."""
        width = self.kernel_size[1]
        return join(mirror_kernel(self.even, width, +1), mirror_kernel(self.odd, width, -1), dim=0)

    @torch.no_grad()
    def set_kernel(self, kernel: Tensor) -> None:
        """Replaces the parameters by the left parts of a whole kernel, which may have another size."""
        self.kernel_size = pair(kernel.shape[-2:])
        width = self.kernel_size[1]
        even, odd = split(kernel, dim=0)
        self.even = nn.Parameter(even[..., : width - width // 2].clone(), requires_grad=self.even.requires_grad)
        self.odd = nn.Parameter(odd[..., : width // 2].clone(), requires_grad=self.odd.requires_grad)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("even", "odd"):
            kernel = state_dict.get(prefix + name)
            if kernel is not None and kernel.ndim == 4 and kernel.shape[1] != self.in_channels:
                _logger.warning(f"Adapts {prefix}{name} from {kernel.shape[1]} to {self.in_channels} input channels.")
                state_dict[prefix + name] = adapt_input_conv(self.in_channels, kernel, base_chans=kernel.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, image: Tensor) -> Tensor:
        check_patch_width(image.shape[-1], self.kernel_size[1])
        bias = None if self.bias is None else F.pad(self.bias, (0, self.out_channels // 2)) * self.scale
        return F.conv2d(image, self.kernel() * self.scale, bias, stride=self.kernel_size)

    def extra_repr(self) -> str:
        outer = self.out_channels // 2
        return f"{self.in_channels} -> {outer}e+{outer}o, kernel_size={self.kernel_size}, scale={self.scale:.4g}"


@has_side_effect
@torch.fx.wrap
def check_patch_width(image_width: int, patch_width: int) -> None:
    """Raises ValueError if an image's width is not a multiple of the patch width."""
    if image_width % patch_width:
        raise ValueError(
            f"image width {image_width} is not a multiple of the patch width {patch_width}: the remaining columns "
            f"on the right would break the mirror symmetry; use a multiple of {patch_width}"
        )


class FlopDepthwiseConv(nn.Module):
    """Depthwise convolution with symmetric and antisymmetric kernels (sec. 4.3).

    The first half of the even channels has symmetric kernels and stays even; the second half has antisymmetric kernels
    and becomes odd. The first half of the odd channels becomes even; the second half stays odd. Only even results have
    a bias.

    Shape: (B, C, H, W) -> (B, C, H, W).
    Cost: kernel_size^2 multiply-adds per channel and position, as for nn.Conv2d (sec. 4.4).
    Raises: ValueError if C is not a multiple of 4 or the kernel size is even.
    """

    def __init__(self, num_channels: int, kernel_size: int = 7, device=None, dtype=None) -> None:
        super().__init__()
        if num_channels % 4:
            raise ValueError(
                f"embed_dim={num_channels} does not divide into four kinds of depthwise kernels: use a multiple of 4"
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
        """Initializes kernels as ConvNeXt does, from a truncated normal with std 0.02."""
        for part in (self.even_to_even, self.even_to_odd, self.odd_to_even, self.odd_to_odd):
            trunc_normal_(part, std=0.02)
        nn.init.zeros_(self.bias)

    reset_parameters = init_weights  # torch's name, which timm calls for weight_init="reset"

    def kernel(self) -> Tensor:
        """The whole kernel, (C, 1, kernel_size, kernel_size), by source and target: ee, eo, oe, oo."""
        pairs = self.kernel_size // 2
        ee, eo, oe, oo = self.even_to_even, self.even_to_odd, self.odd_to_even, self.odd_to_odd
        # Builds the columns of all four kinds at once. Mirroring each kind separately takes twice the time.
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
        # Reorders the channels in channels-last layout, which is how the block's norm and linear layers read them.
        y = rearrange(y.permute(0, 2, 3, 1), "B H W (source target C) -> B H W (target source C)", source=2, target=2)
        return y.permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        channels = self.num_channels // 2
        return f"{channels}e+{channels}o, kernel_size={self.kernel_size}"
