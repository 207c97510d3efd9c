"""The patch embedding's convolution, with kernels that a group's irreps prescribe."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.fx.node import has_side_effect

from flopeq.groups import Group, group_named
from flopeq.layers.conv import check_patch_width, pair
from flopeq.layers.group.orbits import OrbitFields
from flopeq.layers.group.parts import describe_parts, multiplicities

_logger = logging.getLogger(__name__)


class GroupPatchConv(nn.Module):
    """Convolution whose kernels obey k(g p) = rho(g) k(p), for each irrep rho. It generalizes `FlopPatchConv`.

    The stride equals the kernel size, so the layer embeds patches. The parameters are named by the irreps and hold the
    free values of the kernels, (multiplicity, in_channels, num_free). The second row of a two-dimensional irrep has the
    kernels of the first, transposed. `scale` multiplies the result. `load_state_dict` adapts kernels of another number
    of input channels as timm's `adapt_input_conv` does, and takes the kernels of a `FlopPatchConv`.

    Shape: (B, in_channels, H, W) -> (B, out_channels, H/kh, W/kw).
    Raises: ValueError if out_channels is not a multiple of |G|, if the group transposes and the kernel or the image is
    not square, or if the image is not a multiple of the patch size along an axis that the group mirrors.
    """

    def __init__(
        self,
        group: Group,
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
        self.group, self.in_channels, self.out_channels, self.scale = group, in_channels, out_channels, scale
        self.kernel_size = pair(kernel_size)
        check_square(group.name, "patch_size", self.kernel_size)
        self.fields = _fields(group, self.kernel_size, **dd)
        widths = multiplicities(group, out_channels, "embed_dim")
        for irrep, width in zip(group.irreps, widths, strict=True):
            free = torch.empty(width, in_channels, self._field(irrep.name).num_free, **dd)
            self.register_parameter(irrep.name, nn.Parameter(free))
        self.bias = nn.Parameter(torch.zeros(widths[0], **dd)) if bias else None
        self.init_weights()

    def _field(self, name: str) -> OrbitFields:
        field = self.fields[name]
        assert isinstance(field, OrbitFields)
        return field

    def init_weights(self) -> None:
        """Initializes all kernels from the distribution of nn.Conv2d, with the fan-in of the whole kernel."""
        bound = (self.in_channels * self.kernel_size[0] * self.kernel_size[1]) ** -0.5
        for irrep in self.group.irreps:
            nn.init.uniform_(self.get_parameter(irrep.name), -bound, bound)
            self._field(irrep.name).reset_tables()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    reset_parameters = init_weights  # torch's name, which timm calls for weight_init="reset"

    def kernel(self) -> Tensor:
        """The whole kernel, (out_channels, in_channels, kh, kw)."""
        return torch.cat(
            [
                self.fields[irrep.name](getattr(self, irrep.name)).movedim(2, 0).flatten(0, 1)
                for irrep in self.group.irreps
            ]
        )

    @torch.no_grad()
    def set_kernel(self, kernel: Tensor) -> None:
        """Replaces the parameters by the free values of a whole kernel, which may have another size."""
        self.kernel_size = pair(kernel.shape[-2:])
        check_square(self.group.name, "patch_size", self.kernel_size)
        self.fields = _fields(self.group, self.kernel_size, device=kernel.device, dtype=kernel.dtype)
        start = 0
        for irrep in self.group.irreps:
            old = self.get_parameter(irrep.name)
            rows = kernel[start : start + irrep.dim * len(old)].unflatten(0, (irrep.dim, -1)).movedim(0, 2)
            free = self._field(irrep.name).free_values(rows)
            setattr(self, irrep.name, nn.Parameter(free, requires_grad=old.requires_grad))
            start += irrep.dim * len(old)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for irrep in self.group.irreps:
            name = prefix + irrep.name
            kernel = state_dict.get(name)
            if kernel is not None and kernel.ndim == 4:
                kernel = state_dict[name] = kernel.flatten(2)
            if kernel is not None and kernel.ndim == 3 and kernel.shape[1] != self.in_channels:
                _logger.warning(f"Adapts {name} from {kernel.shape[1]} to {self.in_channels} input channels.")
                adapted = adapt_input_conv(self.in_channels, kernel[..., None], base_chans=kernel.shape[1])
                state_dict[name] = adapted[..., 0]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, image: Tensor) -> Tensor:
        check_patches(self.group.name, (image.shape[-2], image.shape[-1]), self.kernel_size)
        bias = self.bias
        if bias is not None:
            bias = F.pad(bias, (0, self.out_channels - bias.shape[0])) * self.scale
        return F.conv2d(image, self.kernel() * self.scale, bias, stride=self.kernel_size)

    def extra_repr(self) -> str:
        outer = describe_parts(self.group, self.out_channels)
        return f"{self.in_channels} -> {outer}, kernel_size={self.kernel_size}, scale={self.scale:.4g}"


def _fields(group: Group, size: tuple[int, int], **dd: Any) -> nn.ModuleDict:
    return nn.ModuleDict({irrep.name: OrbitFields(group, irrep, size, **dd) for irrep in group.irreps})


@has_side_effect
@torch.fx.wrap
def check_square(group_name: str, what: str, size: tuple[int, int]) -> None:
    """Raises ValueError if a group transposes, and a size is not square."""
    if group_named(group_name).transposes and size[0] != size[1]:
        raise ValueError(
            f"{what} {size[0]} x {size[1]} is not square: {group_name} turns images by a quarter, so that it needs "
            "square images, grids and patches; c2xc2 and c2 take any"
        )


@has_side_effect
@torch.fx.wrap
def check_patches(group_name: str, image_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    """Raises ValueError for an image that the group cannot act on by moving its patches."""
    check_square(group_name, "image size", image_size)
    check_patch_width(image_size[1], patch_size[1])
    if group_named(group_name).flips and image_size[0] % patch_size[0]:
        raise ValueError(
            f"image height {image_size[0]} is not a multiple of the patch height {patch_size[0]}: the remaining rows "
            f"at the bottom would break the mirror symmetry; use a multiple of {patch_size[0]}"
        )
