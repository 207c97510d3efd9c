"""Converts DeiT III checkpoints of octic-vits (github.com/davnords/octic-vits) to those of flopeq's octic hybrids.

The converted weights define the same function in a network with `octic_vits="hybrid"` (their H8) or "invariant" (I8).
Their irreps A1, A2, B1, B2 are a1, a2, b1, b2 here. Two differences are in E, which is e here:

- Their second row is the first one turned by a quarter, here it is the first one transposed, so it has the opposite
  sign. The layers do not see the sign, because both rows share their weights.
- Their regular basis pairs the two halves of the channels in another way. A butterfly of the weights on both sides of
  the activation makes up for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flopeq.groups import D4, Irrep
from flopeq.hub.tensor_source import Tensors, TensorSource, convert_linear, convert_vit_block
from flopeq.irreps import SQRT_HALF, butterfly
from flopeq.layers.group import OrbitFields
from flopeq.models.octic_vits import ConcatenatedIrreps

IRREPS = {"a1": "A1", "a2": "A2", "b1": "B1", "b2": "B2", "e": "E"}


def is_octic(source: TensorSource) -> bool:
    """Whether the tensors are those of octic-vits."""
    return "patch_embed.lift8.conv_A1.weight" in source


def convert_octic_vit(source: TensorSource) -> Tensors:
    """Converts a ViT of octic-vits, except for its head.

    Raises: ValueError if tensors are missing, or if the network is not one of their DeiT III networks.
    """
    if "mask_token.0" in source or "register_tokens.0" in source:
        raise ValueError("the checkpoint is a DINOv2 backbone of octic-vits: flopeq converts their DeiT III networks")
    tensors = _patches(source) | _positions(source)
    for index in range(1, 5):
        source.drop_zeros(f"cls_token.{index}")
    tensors["cls_token"] = source.take("cls_token.0")
    split = sum(f"blocks.{index}.norm1.scaling.beta" in source for index in range(source.depth))
    for index in range(source.depth):
        tensors |= (_octic_block if index < split else convert_vit_block)(source, f"blocks.{index}")
    tensors |= convert_linear(source, "norm", "norm")
    if "invariant_proj.weight" in source:
        _check_power_spectrum(source.left["invariant_proj.weight"])
        tensors |= convert_linear(source, "invariant_proj", f"blocks.{split}.split.proj")
    else:
        scale = tensors["norm.weight"]
        tensors[f"blocks.{split}.split.signs"] = ConcatenatedIrreps(len(scale), scale.device, scale.dtype).signs
    return tensors


def _check_power_spectrum(weight: Tensor) -> None:
    num_channels, num_invariants = weight.shape
    if num_invariants != 6 * num_channels // 8:
        raise ValueError(
            f"'invariant_proj.weight' maps {num_invariants} invariants to {num_channels} channels, but the power "
            f"spectrum has {6 * num_channels // 8}: flopeq does not have octic-vits' other invariants"
        )


def _patches(source: TensorSource) -> Tensors:
    """Converts the patch kernels, whose upper left quadrants are stored, and more values than are free."""
    old, new = "patch_embed.lift8.conv_", "patch_embed.proj"
    tensors = {f"{new}.bias": source.take(f"{old}A1.bias")}
    for irrep in D4.irreps:
        sides = ("_left", "_right") if irrep.dim > 1 else ("",)
        quadrants = torch.cat([source.take(f"{old}{IRREPS[irrep.name]}{side}.weight") for side in sides])
        tensors[f"{new}.{irrep.name}"] = _free_values(irrep, quadrants) * (irrep.dim / D4.order) ** 0.5
    return {name: tensor / SQRT_HALF for name, tensor in tensors.items()}  # flopeq's layer multiplies by it


def _positions(source: TensorSource) -> Tensors:
    """Converts the position embedding, stored as the patch kernels are, with channels last."""
    quadrants = [source.take(f"pos_embed.{index}").movedim(-1, 0) for index in range(6)]
    of_irreps = [*quadrants[:4], torch.cat(quadrants[4:])]
    return {
        f"pos_embed.{irrep.name}": _free_values(irrep, quadrant).mT
        for irrep, quadrant in zip(D4.irreps, of_irreps, strict=True)
    }


def _free_values(irrep: Irrep, quadrants: Tensor) -> Tensor:
    """The free values of the field that upper left quadrants give, averaged over the group up to a factor.

    Row i of the field is the sum over all symmetries g of rho(g)_i1 times the quadrant, moved by g.

    Shape: (..., H/2, W/2) -> (..., num_free).
    """
    height, width = 2 * quadrants.shape[-2], 2 * quadrants.shape[-1]
    whole = F.pad(quadrants, (0, width // 2, 0, height // 2))
    moved = torch.stack([g(whole) for g in D4.elements])
    first_column = torch.tensor([[row[0] for row in irrep.matrices[g]] for g in D4.elements])
    fields = torch.einsum("gi,g...hw->...ihw", first_column.to(moved), moved)
    return OrbitFields(D4, irrep, (height, width), device=moved.device, dtype=moved.dtype).free_values(fields)


def _octic_block(source: TensorSource, name: str) -> Tensors:
    block = {f"{name}.ls{index}.gamma": _scales(source, f"{name}.gamma_{index}") for index in (1, 2)}
    for layer in (f"{name}.norm1", f"{name}.norm2"):
        block[f"{layer}.weight"] = _scales(source, f"{layer}.scaling")
        block[f"{layer}.bias"] = source.take(f"{layer}.scaling.beta")
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        block |= _linear(source, f"{name}.{layer}")
    for layer, channels in (("fc1", 0), ("fc2", 1)):
        weight = f"{name}.mlp.{layer}.e.weight"
        left, right = block[weight].chunk(2, channels)
        block[weight] = torch.cat(butterfly(right, left), channels)
    return block


def _linear(source: TensorSource, layer: str) -> Tensors:
    weights = {f"{layer}.{ours}.weight": source.take(f"{layer}.lin_{theirs}.weight") for ours, theirs in IRREPS.items()}
    return weights | {f"{layer}.a1.bias": source.take(f"{layer}.lin_A1.bias")}


def _scales(source: TensorSource, layer: str) -> Tensor:
    return torch.cat([source.take(f"{layer}.alpha_{theirs}") for theirs in IRREPS.values()])
