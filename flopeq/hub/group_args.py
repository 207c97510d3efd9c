"""Infers the arguments of a network with a group beyond the flop from its weights."""

from __future__ import annotations

import math
import re
from typing import Any

from flopeq.groups import GROUPS, TRIVIAL, Group
from flopeq.hub.tensor_source import Tensors
from flopeq.layers.group.orbits import size_of_fields
from flopeq.models.symmetry import block_groups, default_head, format_symmetry

STEMS = {"vit": "patch_embed.proj", "resmlp": "stem.proj", "convnext_iso": "stem"}
"""The module of the patch embedding, by family."""


def infer_group_args(tensors: Tensors, model_name: str, family: str) -> dict[str, Any]:
    """`symmetry`, `head` and `octic_vits` where they differ from the model's defaults, and `img_size`.

    The image size is left out if the first block has no group beyond the flop, and for ConvNeXts, which take any.
    """
    first_layer = re.compile(r"blocks\.(\d+)\.(?:mlp|mlp_channels)\.fc1\.(?:(\w+)\.)?weight")
    named = {group.irreps[0].name: group for group in GROUPS.values() if group is not TRIVIAL} | {None: TRIVIAL}
    found = [(match, name) for name in tensors if (match := first_layer.fullmatch(name)) and match[2] in named]
    layers = {int(match[1]): (named[match[2]], name) for match, name in found}
    groups = [layers[index][0] for index in range(len(layers))]

    args: dict[str, Any] = {}
    if groups != list(block_groups(model_name, len(groups), None, None)):
        args["symmetry"] = format_symmetry(groups)
    if groups[0].order > 2 and family != "convnext_iso":
        args["img_size"] = _infer_image_size(tensors, groups[0], STEMS[family])
    last, name = layers[len(groups) - 1]
    if last is not TRIVIAL:
        num_trivial = tensors[name].shape[1]
        head = "trivial" if tensors["head.weight"].shape[1] == num_trivial else "power"
        if head != default_head(last):
            args["head"] = head
    return args | _infer_octic_vits(tensors)


def _infer_image_size(tensors: Tensors, group: Group, stem: str) -> list[int]:
    """The image (H, W): the grid of tokens times the patch. ResMLP's grid is taken to be square."""
    names = [irrep.name for irrep in group.irreps]
    patch_size = size_of_fields(group, tuple(tensors[f"{stem}.{name}"].shape[-1] for name in names))
    if f"pos_embed.{names[0]}" in tensors:
        grid_size = size_of_fields(group, tuple(len(tensors[f"pos_embed.{name}"]) for name in names))
    else:
        num_tokens = sum(
            irrep.dim * len(tensors[f"blocks.0.linear_tokens.{irrep.name}.weight"]) for irrep in group.irreps
        )
        grid_size = 2 * (math.isqrt(num_tokens),)
    return [grid * patch for grid, patch in zip(grid_size, patch_size, strict=True)]


def _infer_octic_vits(tensors: Tensors) -> dict[str, str]:
    split = re.compile(r"blocks\.\d+\.split\.(signs|proj\.weight)")
    found = [match[1] for match in map(split.fullmatch, tensors) if match]
    return {"octic_vits": "hybrid" if found[0] == "signs" else "invariant"} if found else {}
