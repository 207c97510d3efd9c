"""Layers that commute with the flop. Inputs and outputs have channels even then odd (see `flopeq.irreps`).

Each layer implements its computation in `on_halves`, which takes and returns the two halves as separate tensors.
`forward` splits its input and joins the result. Blocks chain `on_halves`, because joining the halves between two
layers would cost a copy.

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
from flopeq.layers.linear import FlopLinear, Halves, add_residual
from flopeq.layers.mlp import FlopGELU, FlopMlp
from flopeq.layers.norm import FlopLayerNorm

__all__ = [
    "BiparityAffine", "BiparityLinear", "BiparityMlp", "ColumnParity", "FlopAttention", "FlopDepthwiseConv",
    "FlopGELU", "FlopLayerNorm", "FlopLinear", "FlopMlp", "FlopPatchConv", "FlopPatchEmbed", "FlopPosEmbed",
    "FlopResBlock", "Halves", "ParityParts", "TokenMixing", "add_residual", "check_patch_width", "mirror_kernel",
    "pair",
]  # fmt: skip
