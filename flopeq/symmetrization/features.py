"""How a group acts on the features of timm's networks: on their grid, whatever form they have.

Features are grids (B, C, H, W), grids with channels last, or tokens in raster order after prefix tokens such as the
class token. Pooled features are invariant. Features of flopeq's equivariant blocks are irreps: the flop and the half
turn, which mirror the columns, also negate their odd half, in every group of which these signs are a representation.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from flopeq.irreps import flop
from flopeq.layers.biparity import ColumnParity
from flopeq.square import FLIP, FLOP, IDENTITY, TURN, Symmetry
from flopeq.symmetrization.outputs import Action

MIRRORS_COLUMNS = (FLOP, TURN)


def final_action(model: nn.Module, group: tuple[Symmetry, ...], image_size: tuple[int, int]) -> Action:
    """The action on what `forward_features` returns for images of size (H, W)."""
    equivariant = bool(getattr(model, "equivariant", False))
    act = partial(_act_on_features, model, image_size, equivariant)
    return partial(_act_with_signs, act) if equivariant and _has_signs(group) else act


def intermediate_action(
    model: nn.Module, group: tuple[Symmetry, ...], indices: int | list[int] | None, position: int
) -> Action:
    """The action on the features of a block: on image grids, (B, C, H, W), and on prefix tokens, (B, N, C).

    The block is the one at `position` of those that `forward_intermediates` selects with `indices`.
    """
    num_flop_blocks = getattr(model, "num_flop_blocks", 0)
    if not num_flop_blocks or not _has_signs(group):
        return _act_on_grid
    blocks: Any = model.blocks
    index = feature_take_indices(len(blocks), indices)[0][position]
    return partial(_act_with_signs, _act_on_grid) if index < num_flop_blocks else _act_on_grid


def _has_signs(group: tuple[Symmetry, ...]) -> bool:
    return set(group) <= {IDENTITY, FLOP, FLIP, TURN}


def _act_with_signs(act: Action, g: Symmetry, features: Tensor) -> Tensor:
    features = act(g, features)
    if g not in MIRRORS_COLUMNS:
        return features
    return flop(features, 1 if features.dim() == 4 else -1)


def _act_on_grid(g: Symmetry, features: Tensor) -> Tensor:
    return g(features) if features.dim() == 4 else features


def _act_on_features(
    model: nn.Module, image_size: tuple[int, int], equivariant: bool, g: Symmetry, features: Tensor
) -> Tensor:
    if features.dim() == 2:
        return features
    if features.dim() == 4:
        return g(features, dims=(1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else (2, 3))
    height, width = token_grid(model, image_size, features.shape[1])
    if g.swaps_axes and height != width:
        raise ValueError(f"the {g} cannot act on {height} x {width} tokens, which are not a square grid")
    columns = getattr(model, "columns", None)
    if equivariant and isinstance(columns, ColumnParity):  # E(ResMLP) sorts its tokens by the parity of columns
        return columns.from_raster(_act_on_tokens(g, columns.to_raster(features), height, width))
    return _act_on_tokens(g, features, height, width)


def _act_on_tokens(g: Symmetry, tokens_BNC: Tensor, height: int, width: int) -> Tensor:
    prefix, grid = tokens_BNC.split([tokens_BNC.shape[1] - height * width, height * width], dim=1)
    return torch.cat((prefix, g(grid.unflatten(1, (height, width)), dims=(1, 2)).flatten(1, 2)), dim=1)


def token_grid(model: nn.Module, image_size: tuple[int, int], num_tokens: int) -> tuple[int, int]:
    """Rows and columns of a network's tokens; prefix tokens come first. Raises: ValueError if it does not tell."""
    embed: Any = getattr(model, "patch_embed", getattr(model, "stem", None))
    if hasattr(embed, "dynamic_feat_size"):
        height, width = embed.dynamic_feat_size(image_size)
        if num_tokens == height * width + getattr(model, "num_prefix_tokens", 0):
            return height, width
    raise ValueError(
        f"the features of {type(model).__name__} are {num_tokens} tokens whose grid it does not tell: its logits can "
        "be symmetrized, its features cannot"
    )
