"""ResMLPs that commute with a group of symmetries of the square, block by block (see `flopeq.groups`).

Between the blocks the channels are in the irreps of a block's group, and tokens in the order of its places. Token
mixing changes tokens to irreps and back. Where the group becomes smaller, features are restricted to it. Where it ends,
ordinary blocks follow, on channels in the regular basis and tokens in raster order.

Shape suffixes: B batch, N tokens, C channels, H W grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from timm.models._features import feature_take_indices
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from torch import Tensor, nn

from flopeq.groups import TRIVIAL, Group
from flopeq.layers.conv import pair
from flopeq.layers.group.embed import GroupPatchEmbed
from flopeq.layers.group.mixing import GroupGridAffine, GroupResBlock
from flopeq.layers.group.tokens import GridTokens, ReorderTokens, RestrictFeatures
from flopeq.models.resmlp import FIXED_GRID, REFUSED
from flopeq.models.variants import refuse_arguments

__all__ = ["GroupMlpMixer"]


class RestrictingGroupResBlock(GroupResBlock):
    """The first block of a smaller group."""

    restrict: RestrictFeatures

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.restrict(x))


class RestrictingResBlock(ResBlock):
    """The first ordinary block."""

    restrict: RestrictFeatures

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.restrict(x))


class PlacesPatchEmbed(GroupPatchEmbed):
    """Patch embedding with tokens in the order of places."""

    def __init__(self, tokens: GridTokens, *args: Any, device=None, **kwargs: Any) -> None:
        super().__init__(tokens.group, *args, device=device, **kwargs)
        self.reorder = ReorderTokens(GridTokens(TRIVIAL, tokens.grid_size), tokens, device)

    def forward(self, image: Tensor) -> Tensor:
        return self.reorder(super().forward(image))
