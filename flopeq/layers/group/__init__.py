"""Layers that commute with a group of symmetries of the square (see `flopeq.groups`).

A layer's first argument is its group. It takes features as one tensor, with channels in the order of the group's
irreps, or as a tuple of separate parts, one for each irrep, and returns the same form. Parameters and submodules are
named by the irreps. With C2 the layers compute what those of `flopeq.layers` do, on the same weights.

The layers of a ResMLP have the tokens of their grid, a `GridTokens`, as their first argument.

Shape suffixes: B batch, N tokens, C channels, H W grid, h heads, d head width.
"""

from flopeq.layers.group.attention import GroupAttention
from flopeq.layers.group.conv import GroupPatchConv, check_patches, check_square
from flopeq.layers.group.depthwise import GroupDepthwiseConv
from flopeq.layers.group.embed import GroupPatchEmbed, GroupPosEmbed
from flopeq.layers.group.linear import GroupLinear
from flopeq.layers.group.mixing import (
    GroupGridAffine,
    GroupGridLinear,
    GroupGridMlp,
    GroupResBlock,
    GroupTokenMixing,
    product_and_bias,
    widen_scales,
)
from flopeq.layers.group.mlp import GroupGELU, GroupMlp
from flopeq.layers.group.norm import GroupLayerNorm, GroupLayerScale
from flopeq.layers.group.orbits import OrbitFields, OrbitTable, orbit_table
from flopeq.layers.group.parts import add_residual, from_parts, to_parts
from flopeq.layers.group.tokens import FixedTable, GridTokens, InvariantConstants, ReorderTokens, RestrictFeatures

__all__ = [
    "FixedTable", "GridTokens", "GroupAttention", "GroupDepthwiseConv", "GroupGELU", "GroupGridAffine",
    "GroupGridLinear", "GroupGridMlp", "GroupLayerNorm", "GroupLayerScale", "GroupLinear", "GroupMlp",
    "GroupPatchConv", "GroupPatchEmbed", "GroupPosEmbed", "GroupResBlock", "GroupTokenMixing", "InvariantConstants",
    "OrbitFields", "OrbitTable", "ReorderTokens", "RestrictFeatures", "add_residual", "check_patches",
    "check_square", "from_parts", "orbit_table", "product_and_bias", "to_parts", "widen_scales",
]  # fmt: skip
