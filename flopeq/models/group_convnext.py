"""Isotropic ConvNeXts that commute with more than the flop: C2 x C2 (flop and flip), D4 (octic), and graded ones.

`mirrors_<X>` and `octic_<X>` are the equivariant networks, `mirrorshybrid_<X>` and `octichybrid_<X>` their hybrids.
All four take `symmetry`, such as "d4:6,c2:12", which gives every block its group. What has no group beyond C2 is built
by `flopeq.models.convnext`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates
from timm.layers.weight_init import trunc_normal_
from timm.models import build_model_with_cfg
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from flopeq.groups import C2, TRIVIAL, Group
from flopeq.irreps import SQRT_HALF
from flopeq.layers.conv import pair
from flopeq.layers.group.conv import GroupPatchConv, check_patches
from flopeq.layers.group.depthwise import GroupDepthwiseConv
from flopeq.layers.group.mlp import GroupMlp
from flopeq.layers.group.norm import GroupLayerNorm
from flopeq.layers.group.parts import add_residual, multiplicities, split_scales
from flopeq.models.convnext import KERNEL_SIZE, REFUSED, SIZES, ConvNeXtIso, FlopConvNeXtBlock, IsotropicConvNeXt
from flopeq.models.symmetry import (
    GroupHead,
    block_groups,
    check_group_head,
    flop_arguments,
    format_symmetry,
    parse_symmetry,
)
from flopeq.models.variants import baseline_name, make_default_cfgs, refuse_arguments, register_variants
from flopeq.registry import GROUP_VARIANTS

__all__ = ["GroupConvNeXtIso"]


class GroupConvNeXtBlock(ConvNeXtBlock):
    """timm's ConvNeXt block with layers that commute with a group.

    Shape: (B, C, H, W) -> (B, C, H, W).
    Raises: ValueError if C is not a multiple of |G|.
    """

    norm: GroupLayerNorm
    mlp: GroupMlp

    def __init__(
        self, group: Group, channels: int, ls_init_value: float | None, drop_path: float, device=None, dtype=None
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            channels,
            norm_layer=partial(GroupLayerNorm, group),
            ls_init_value=ls_init_value,
            drop_path=drop_path,
            mlp_ratio=1,
            **dd,
        )
        self.group = group
        self.conv_dw = GroupDepthwiseConv(group, channels, KERNEL_SIZE, **dd)
        self.mlp = GroupMlp(group, channels, 4 * channels, **dd)
        if ls_init_value is not None:
            scales = sum(multiplicities(group, channels, "embed_dim"))
            self.gamma = nn.Parameter(torch.full((scales,), ls_init_value, **dd))

    def forward(self, x: Tensor) -> Tensor:
        # Flattens the grid for the reason that `FlopConvNeXtBlock` gives.
        parts, update = (self.group.split(y.flatten(2).transpose(1, 2)) for y in (x, self.conv_dw(x)))
        update = self.mlp(self.norm(update))
        if self.gamma is not None:
            scales = split_scales(self.group, self.gamma)
            update = tuple(scale * part for scale, part in zip(scales, update, strict=True))
        y = self.group.join(add_residual(self.group, parts, update, self.drop_path))
        return y.transpose(1, 2).unflatten(2, x.shape[-2:])


class RestrictsFirst:
    """Mixin for a block that first restricts its grid from the group of the block before to its own group."""

    group_before: Group
    group: Group

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = self.group_before.restrict(x.movedim(1, -1), self.group).movedim(-1, 1)
        return super().forward(x, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


class RestrictingGroupBlock(RestrictsFirst, GroupConvNeXtBlock):
    """The first block of C2 x C2 after blocks of D4."""


class RestrictingFlopBlock(RestrictsFirst, FlopConvNeXtBlock):
    """The first block of C2 after blocks of a larger group."""


class RestrictingBlock(RestrictsFirst, ConvNeXtBlock):
    """The first ordinary block. It restricts to the trivial group, which is the change to the regular basis."""


def _make_block(groups: tuple[Group, ...], index: int, channels: int, **kwargs: Any) -> ConvNeXtBlock:
    """Makes a block. Blocks of C2 are those of E(ConvNeXt)."""
    group, before = groups[index], groups[max(index - 1, 0)]
    restricts = group is not before
    if group is TRIVIAL:
        block = (RestrictingBlock if restricts else ConvNeXtBlock)(channels, kernel_size=KERNEL_SIZE, **kwargs)
    elif group is C2:
        block = (RestrictingFlopBlock if restricts else FlopConvNeXtBlock)(channels, **kwargs)
    else:
        block = (RestrictingGroupBlock if restricts else GroupConvNeXtBlock)(group, channels, **kwargs)
    if isinstance(block, RestrictsFirst):
        block.group_before, block.group = before, group
    return block


class GroupConvNeXtIso(GroupHead, IsotropicConvNeXt):
    """Isotropic ConvNeXt each of whose blocks commutes with a group. The groups shrink with the depth.

    The first group is that of the stem. Where the group changes, the features are restricted to the next one by a fixed
    orthogonal change of channels. The logits are invariant under the last block's group. After ordinary blocks nothing
    is promised of them.

    Args:
        symmetry: the groups of the blocks, as `parse_symmetry` reads them.
        head: "trivial" or "power", see `GroupHead`.
        and the other arguments of `ConvNeXtIso`, except for `num_flop_blocks`.
    Shape: (B, in_chans, H, W) -> (B, num_classes).
    Raises: ValueError for widths that do not split into the group's parts, and for images that the group does not act
    on (D4 needs square ones).
    """

    def __init__(
        self,
        symmetry: str,
        head: str | None = None,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 18,
        ls_init_value: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        groups = parse_symmetry(symmetry, depth)
        check_patches(groups[0].name, pair(img_size), pair(patch_size))
        stem = GroupPatchConv(groups[0], in_chans, embed_dim, patch_size, scale=SQRT_HALF, **dd)
        blocks = [
            _make_block(groups, index, embed_dim, ls_init_value=ls_init_value, drop_path=rate, **dd)
            for index, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth))
        ]
        super().__init__(
            stem, blocks, in_chans, num_classes, global_pool, embed_dim, patch_size, ls_init_value, drop_rate, **dd
        )
        self.block_groups = groups
        self.init_group_head(head, groups[-1], **dd)
        self.init_norm(**dd)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        IsotropicConvNeXt._init_weights(module)
        if isinstance(module, GroupPatchConv):
            for irrep in module.group.irreps:
                trunc_normal_(module.get_parameter(irrep.name), std=0.02)


def _create(
    name: str,
    pretrained: bool,
    symmetry: str | None = None,
    num_group_blocks: int | None = None,
    head: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    refuse_arguments(kwargs, REFUSED)
    kwargs = SIZES[baseline_name(name)] | kwargs
    groups = block_groups(name, kwargs["depth"], symmetry, num_group_blocks)
    check_group_head(head, groups[-1])
    if groups[0] in (TRIVIAL, C2):
        model_class = ConvNeXtIso
        kwargs |= flop_arguments(groups, head)
    else:
        model_class = GroupConvNeXtIso
        kwargs |= {"symmetry": format_symmetry(groups), "head": head}
    return build_model_with_cfg(
        model_class,
        name,
        pretrained,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **kwargs,
    )


default_cfgs = make_default_cfgs(SIZES, GROUP_VARIANTS, first_conv="stem")

for _name in SIZES:
    register_variants(__name__, _name, GROUP_VARIANTS, _create)
