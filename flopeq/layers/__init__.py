"""Layers that commute with the flop. Inputs and outputs have channels even then odd (see `flopeq.irreps`).

A layer takes features as one tensor, or as a pair of separate halves (even, odd), and returns the same form. Blocks
pass pairs from layer to layer, because joining the halves between two layers would cost a copy. A layer is always
called, so that hooks, adapters, offloading and whatever else is attached to it take part.

Shape suffixes: B batch, N tokens, C channels, H W grid, h heads, d head width.
"""

from flopeq.layers.attention import FlopAttention
from flopeq.layers.biparity import (
    BiparityAffine,
    BiparityLinear,
    BiparityMlp,
    ColumnParity,
    FlopResBlock,
    ParityParts,
    TokenMixing,
)
from flopeq.layers.conv import FlopDepthwiseConv, FlopPatchConv, check_patch_width, mirror_kernel, pair
from flopeq.layers.embed import FlopPatchEmbed, FlopPosEmbed
from flopeq.layers.halves import Halves, add_residual, from_halves, to_halves
from flopeq.layers.linear import FlopLinear
from flopeq.layers.mlp import FlopGELU, FlopMlp
from flopeq.layers.norm import FlopLayerNorm, FlopLayerScale

__all__ = [
    "BiparityAffine", "BiparityLinear", "BiparityMlp", "ColumnParity", "FlopAttention", "FlopDepthwiseConv",
    "FlopGELU", "FlopLayerNorm", "FlopLayerScale", "FlopLinear", "FlopMlp", "FlopPatchConv", "FlopPatchEmbed",
    "FlopPosEmbed", "FlopResBlock", "Halves", "ParityParts", "TokenMixing", "add_residual", "check_patch_width",
    "from_halves", "mirror_kernel", "pair", "to_halves",
]  # fmt: skip
