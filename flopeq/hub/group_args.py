"""Infers the arguments of a vision transformer with a group beyond the flop from its weights."""

from __future__ import annotations

import re
from typing import Any

from flopeq.groups import GROUPS, TRIVIAL, Group
from flopeq.hub.tensor_source import Tensors
from flopeq.layers.group.orbits import size_of_fields
from flopeq.models.symmetry import block_groups, default_head, format_symmetry


def infer_group_args(tensors: Tensors, model_name: str) -> dict[str, Any]:
    """`symmetry`, `head` and `octic_vits` where they differ from the model's defaults, and `img_size`.

    The image size is left out if the first block has no group beyond the flop.
    """
    groups = _groups_of_blocks(tensors)
    args: dict[str, Any] = {}
    if groups != list(block_groups(model_name, len(groups), None, None)):
        args["symmetry"] = format_symmetry(groups)
    first, last = groups[0], groups[-1]
    names = [irrep.name for irrep in first.irreps]
    if first.order > 2:
        grid_size = size_of_fields(first, tuple(tensors[f"pos_embed.{name}"].shape[0] for name in names))
        kernels = [tensors[f"patch_embed.proj.{name}"] for name in names]
        patch_size = size_of_fields(first, tuple(kernel.shape[-1] for kernel in kernels))
        args["img_size"] = [grid * patch for grid, patch in zip(grid_size, patch_size, strict=True)]
    if last is not TRIVIAL:
        num_channels = last.order * tensors["norm.bias"].shape[0]
        head = "trivial" if tensors["head.weight"].shape[1] * last.order == num_channels else "power"
        if head != default_head(last):
            args["head"] = head
    return args | _infer_octic_vits(tensors)


def _groups_of_blocks(tensors: Tensors) -> list[Group]:
    """The group of each block, by the names of the parts of its first layer."""
    layer = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(?:(\w+)\.)?weight")
    found = [match for match in map(layer.fullmatch, tensors) if match]
    named = {group.irreps[0].name: group for group in GROUPS.values() if group is not TRIVIAL} | {None: TRIVIAL}
    of_block = {int(match[1]): named[match[2]] for match in found if match[2] in named}
    return [of_block[index] for index in range(len(of_block))]


def _infer_octic_vits(tensors: Tensors) -> dict[str, str]:
    split = re.compile(r"blocks\.\d+\.split\.(signs|proj\.weight)")
    found = [match[1] for match in map(split.fullmatch, tensors) if match]
    return {"octic_vits": "hybrid" if found[0] == "signs" else "invariant"} if found else {}
