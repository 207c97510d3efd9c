"""Patch and position embeddings that commute with a group."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import PatchEmbed, resample_patch_embed
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from flopeq.groups import Group
from flopeq.layers.conv import pair
from flopeq.layers.embed import resample_tokens
from flopeq.layers.group.conv import GroupPatchConv, check_patches, check_square
from flopeq.layers.group.orbits import OrbitFields
from flopeq.layers.group.parts import describe_parts, multiplicities

torch.fx.wrap("resample_tokens")  # a wrapped function is known in its own module only


class GroupPatchEmbed(PatchEmbed):
    """timm's `PatchEmbed` with a `GroupPatchConv`. Tokens are in raster order.

    Shape: (B, in_chans, H, W) -> (B, N, C), or (B, C, H, W) with flatten=False.
    Raises: ValueError as `GroupPatchConv` does, and for `dynamic_img_pad`, which pads one side only.
    """

    proj: GroupPatchConv  # pyright: ignore[reportIncompatibleVariableOverride]
    patch_size: tuple[int, int]

    def __init__(
        self,
        group: Group,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        scale: float = 1.0,
        dynamic_img_pad: bool = False,
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if dynamic_img_pad:
            raise ValueError("dynamic_img_pad pads on one side only, which breaks the mirror symmetry")
        if img_size is not None:
            check_patches(group.name, pair(img_size), pair(patch_size))
        super().__init__(img_size, patch_size, in_chans, embed_dim, bias=bias, **dd, **kwargs)  # pyright: ignore[reportArgumentType]
        self.proj = GroupPatchConv(group, in_chans, embed_dim, patch_size, bias=bias, scale=scale, **dd)

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """Changes the image or the patch size. Kernels are resampled as in timm and keep their symmetry."""
        new_img_size, new_patch_size = pair(img_size or self.img_size or 1), pair(patch_size or self.patch_size)
        check_square(self.proj.group.name, "patch_size", new_patch_size)
        if self.img_size is not None or img_size is not None:
            check_patches(self.proj.group.name, new_img_size, new_patch_size)
        if new_patch_size != self.patch_size:
            self.patch_size = new_patch_size
            self.proj.set_kernel(resample_patch_embed(self.proj.kernel(), list(self.patch_size)))
        self.img_size, self.grid_size, self.num_patches = self._init_img_size(img_size or self.img_size)


class GroupPosEmbed(nn.Module):
    """Position embedding e(p) in the basis of irreps, with e(g p) = rho(g) e(p). It generalizes `FlopPosEmbed`.

    The parameters are named by the irreps and hold the free values (num_free, multiplicity). `load_state_dict` takes
    those of a `FlopPosEmbed` too.

    Shape: () -> (1, H*W, C), in raster order.
    Raises: ValueError if the group transposes and the grid is not square.
    """

    def __init__(self, group: Group, grid_size: tuple[int, int], num_channels: int, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_square(group.name, "grid", grid_size)
        self.group, self.num_channels = group, num_channels
        self.grid_size = height, width = pair(grid_size)
        widths = multiplicities(group, num_channels, "embed_dim")
        self.fields = nn.ModuleDict(
            {irrep.name: OrbitFields(group, irrep, (height, width), **dd) for irrep in group.irreps}
        )
        for irrep, multiplicity in zip(group.irreps, widths, strict=True):
            free = torch.empty(self._field(irrep.name).num_free, multiplicity, **dd)
            self.register_parameter(irrep.name, nn.Parameter(free))
        self.init_weights()

    def _field(self, name: str) -> OrbitFields:
        field = self.fields[name]
        assert isinstance(field, OrbitFields)
        return field

    def init_weights(self) -> None:
        """Initializes the embedding as timm does, from a truncated normal with std 0.02."""
        for irrep in self.group.irreps:
            trunc_normal_(self.get_parameter(irrep.name), std=0.02)
            self._field(irrep.name).reset_tables()

    reset_parameters = init_weights  # torch's name, which timm calls for weight_init="reset"

    def forward(self, grid_size: tuple[int, int] | None = None) -> Tensor:
        """The whole embedding. For another grid it is resampled as in timm."""
        parts = [self.fields[irrep.name](getattr(self, irrep.name).mT) for irrep in self.group.irreps]
        # (multiplicity, d, H, W) -> (H*W, d * multiplicity), rows first
        tokens = torch.cat([part.permute(2, 3, 1, 0).flatten(2).flatten(0, 1) for part in parts], -1)[None]
        return tokens if grid_size is None else resample_tokens(tokens, grid_size, self.grid_size)

    @torch.no_grad()
    def resized(self, grid_size: tuple[int, int]) -> GroupPosEmbed:
        """A new embedding, resampled to another grid. Raises: ValueError as the constructor does."""
        tokens = self(grid_size)[0]
        other = GroupPosEmbed(self.group, grid_size, self.num_channels, device=tokens.device, dtype=tokens.dtype)
        for irrep, part in zip(self.group.irreps, self.group.split(tokens), strict=True):
            rows = part[:, None] if irrep.dim == 1 else part  # (H*W, d, multiplicity)
            fields = rows.permute(2, 1, 0).unflatten(-1, pair(grid_size))
            other.get_parameter(irrep.name).copy_(other._field(irrep.name).free_values(fields).mT)
        return other

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for irrep in self.group.irreps:
            free = state_dict.get(prefix + irrep.name)
            if free is not None and free.ndim == 3:
                state_dict[prefix + irrep.name] = free.flatten(0, 1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"grid={self.grid_size}, {describe_parts(self.group, self.num_channels)}"
