"""Converts checkpoints of the paper's authors (github.com/georg-bn/flopping-for-flops) to those of flopeq's models.

The authors' `sym` is even here, and `asym` is odd. The converted weights define the same function. The checkpoints of
their later octic-vits are converted by `flopeq.hub.convert_octic`.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor

from flopeq.hub.convert_octic import convert_octic_vit, is_octic
from flopeq.hub.group_args import STEMS, infer_group_args
from flopeq.hub.tensor_source import Tensors, TensorSource, convert_linear, convert_vit_block
from flopeq.models.build import build, did_you_mean
from flopeq.registry import GROUP_VARIANTS, MODELS, describe

__all__ = ["convert_authors_state_dict", "convert_checkpoint", "load_authors_checkpoint", "infer_args"]


def _take_scale(source: TensorSource, name: str) -> Tensor:
    """Takes the scales of even and odd channels as one tensor, (C,)."""
    return torch.cat((source.take(f"{name}.alpha_sym"), source.take(f"{name}.alpha_asym")))


def _convert_pointwise(source: TensorSource, old: str, new: str) -> Tensors:
    """Converts a linear layer over channels, which may be a convolution of kernel size 1 in the authors' code."""
    layer = convert_linear(source, old, new)
    return {name: tensor.flatten(1) if tensor.ndim > 1 else tensor for name, tensor in layer.items()}


def _convert_affine(source: TensorSource, old: str, new: str) -> Tensors:
    """Converts the scale and shift of X's ResMLP and of the head of E(ResMLP)."""
    return {f"{new}.{part}": source.take(f"{old}.{part}").reshape(1, 1, -1) for part in ("alpha", "beta")}


def _convert_patches(source: TensorSource, old: str, new: str) -> Tensors:
    """Converts symmetric and antisymmetric patch kernels. Both codes store the left half."""
    return {
        f"{new}.even": source.take(f"{old}.proj_sym.weight"),
        f"{new}.odd": source.take(f"{old}.proj_asym.weight"),
        f"{new}.bias": source.take(f"{old}.proj_sym.bias"),
    }


def _flop_linear(source: TensorSource, old: str, new: str) -> Tensors:
    """Converts a block diagonal linear layer with a bias on the even half."""
    return {
        f"{new}.even.weight": source.take(f"{old}.linear_sym.weight").flatten(1),
        f"{new}.even.bias": source.take(f"{old}.linear_sym.bias"),
        f"{new}.odd.weight": source.take(f"{old}.linear_asym.weight").flatten(1),
    }


def _flop_norm(source: TensorSource, old: str, new: str) -> Tensors:
    weight, bias = _take_scale(source, f"{old}.scaling"), source.take(f"{old}.scaling.beta")
    return {f"{new}.weight": weight, f"{new}.bias": bias}


def _infer_grid(order: Tensor) -> tuple[int, int]:
    """Rows and columns of a grid whose tokens are ordered as left half, then mirrored right half, as the authors do.

    Raises: ValueError for any other order, which an EMA over the integer tables can produce.
    """
    num_tokens = len(order)
    width = int(order[num_tokens // 2]) + 1
    if width > 0 and num_tokens % width == 0 and width % 2 == 0:
        raster = torch.arange(num_tokens, device=order.device).view(-1, width)
        left, right = raster.chunk(2, dim=1)
        if torch.equal(order, torch.cat((left.flatten(), right.flip(1).flatten()))):
            return num_tokens // width, width
    raise ValueError("the checkpoint's order of tokens is not a grid's left half and then its mirrored right half")


def _vit(source: TensorSource) -> Tensors:
    if "cls_token" in source:
        stem = convert_linear(source, "patch_embed.proj", "patch_embed.proj")
        stem |= {name: source.take(name) for name in ("cls_token", "pos_embed")}
    else:
        height, _ = _infer_grid(source.take("patch_embed.flatten_and_permute.permutation"))
        stem = _convert_patches(source, "patch_embed", "patch_embed.proj")
        source.drop_zeros("cls_token.1")
        stem["cls_token"] = source.take("cls_token.0")
        for index, parity in enumerate(("even", "odd")):
            left_half = source.take(f"pos_embed.{index}")
            stem[f"pos_embed.{parity}"] = rearrange(left_half, "1 (H W) C -> H W C", H=height)
    blocks: Tensors = {}
    for index in range(source.depth):
        name = f"blocks.{index}"
        blocks |= (_flop_vit_block if f"{name}.norm1.scaling.beta" in source else convert_vit_block)(source, name)
    norm = _flop_norm if "norm.scaling.beta" in source else convert_linear
    return stem | blocks | norm(source, "norm", "norm")


def _flop_vit_block(source: TensorSource, name: str) -> Tensors:
    block = {f"{name}.ls{index}.gamma": _take_scale(source, f"{name}.gamma_{index}") for index in (1, 2)}
    for layer in ("norm1", "norm2"):
        block |= _flop_norm(source, f"{name}.{layer}", f"{name}.{layer}")
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        block |= _flop_linear(source, f"{name}.{layer}", f"{name}.{layer}")
    if f"{name}.attn.attn_mixer" in source:
        # An option of the authors' code weights the scores of the two parities. Here the queries absorb the weights.
        mixer = source.take(f"{name}.attn.attn_mixer")
        for part, weight in {"even.weight": mixer[0], "even.bias": mixer[0], "odd.weight": mixer[1]}.items():
            query, key, value = block[f"{name}.attn.qkv.{part}"].chunk(3)
            block[f"{name}.attn.qkv.{part}"] = torch.cat((weight * query, key, value))
    return block


def _resmlp(source: TensorSource) -> Tensors:
    if "patch_embed.proj_sym.weight" in source:
        table = "patch_embed.flatten_and_permute_to_fourier"
        _infer_grid(torch.cat((source.take(f"{table}.left_idx"), source.take(f"{table}.right_idx"))))
        stem, block, norm = _convert_patches(source, "patch_embed", "stem.proj"), _flop_resmlp_block, "fc_norm"
    else:
        stem, block, norm = convert_linear(source, "patch_embed.proj", "stem.proj"), _resmlp_block, "norm"
    blocks: Tensors = {}
    for index in range(source.depth):
        blocks |= block(source, f"blocks.{index}")
    return stem | blocks | _convert_affine(source, "norm", norm)


def _resmlp_block(source: TensorSource, name: str) -> Tensors:
    block = {f"{name}.ls{index}": source.take(f"{name}.gamma_{index}") for index in (1, 2)}
    for layer in ("norm1", "norm2"):
        block |= _convert_affine(source, f"{name}.{layer}", f"{name}.{layer}")
    for old, new in RESMLP_LINEAR.items():
        block |= convert_linear(source, f"{name}.{old}", f"{name}.{new}")
    return block


def _flop_resmlp_block(source: TensorSource, name: str) -> Tensors:
    block = {f"{name}.ls{index}": _take_scale(source, f"{name}.gamma_{index}") for index in (1, 2)}
    for layer in (f"{name}.norm1", f"{name}.norm2"):
        # The authors' forward never applies the shifts, so zero gives the same function.
        unused = [source.take(f"{layer}.{shift}") for shift in ("beta_sym", "beta_asym")]
        block[f"{layer}.alpha"] = _take_scale(source, layer).reshape(1, 1, -1)
        block[f"{layer}.beta"] = torch.zeros_like(torch.cat(unused)).reshape(1, 1, -1)
    for old, new in RESMLP_LINEAR.items():
        block |= convert_linear(source, f"{name}.{old}.lin_sym", f"{name}.{new}.even")
        block |= convert_linear(source, f"{name}.{old}.lin_asym", f"{name}.{new}.odd")
    return block


RESMLP_LINEAR = {"attn": "linear_tokens", "mlp.fc1": "mlp_channels.fc1", "mlp.fc2": "mlp_channels.fc2"}


def _convnext_iso(source: TensorSource) -> Tensors:
    is_flop = "stem.proj_sym.weight" in source
    tensors = (_convert_patches if is_flop else convert_linear)(source, "stem", "stem")
    block = _flop_convnext_block if is_flop else _convnext_block
    for index in range(source.depth):
        tensors |= block(source, f"blocks.{index}")
    return tensors | convert_linear(source, "norm", "norm")


def _convnext_block(source: TensorSource, name: str) -> Tensors:
    block = convert_linear(source, f"{name}.dwconv", f"{name}.conv_dw")
    block |= convert_linear(source, f"{name}.norm", f"{name}.norm")
    for index in (1, 2):
        block |= _convert_pointwise(source, f"{name}.pwconv{index}", f"{name}.mlp.fc{index}")
    if f"{name}.gamma" in source:
        block[f"{name}.gamma"] = source.take(f"{name}.gamma").flatten()
    return block


def _flop_convnext_block(source: TensorSource, name: str) -> Tensors:
    old, new = f"{name}.dwconv", f"{name}.conv_dw"
    block = _flop_norm(source, f"{name}.norm", f"{name}.norm")
    for kind in ("sym_to_sym", "sym_to_asym", "asym_to_sym", "asym_to_asym"):
        ours = kind.replace("asym", "odd").replace("sym", "even")
        block[f"{new}.{ours}"] = source.take(f"{old}.{kind}.weight")
    biases = [source.take(f"{old}.{kind}.bias") for kind in ("sym_to_sym", "asym_to_sym")]
    block[f"{new}.bias"] = torch.cat(biases)
    for kind in ("sym_to_asym", "asym_to_sym"):
        source.drop_zeros(f"{old}.{kind}.zero_center")
    for index in (1, 2):
        block |= _flop_linear(source, f"{name}.pwconv{index}", f"{name}.mlp.fc{index}")
    if f"{name}.gamma.alpha_sym" in source:
        block[f"{name}.gamma"] = _take_scale(source, f"{name}.gamma")
    return block


CONVERTERS: dict[str, Callable[[TensorSource], Tensors]] = {
    "vit": _vit,
    "resmlp": _resmlp,
    "convnext_iso": _convnext_iso,
}


def _identify(source: TensorSource) -> tuple[str, str]:
    """Family and variant of a checkpoint. Raises ValueError if it is not one of the authors' networks."""
    if is_octic(source):
        return "vit", "H-D4"
    roots = {name.partition(".")[0] for name in source.left}
    if "patch_embed" in roots:
        family = "vit" if "cls_token" in roots else "resmlp"
    elif "stem" in roots:
        family = "convnext_iso"
    else:
        names = ", ".join(sorted(source.left)[:3]) or "nothing"
        raise ValueError(f"not a checkpoint of the authors' ViT, ResMLP or isotropic ConvNeXt: it holds {names}")
    if not {"patch_embed.proj_sym.weight", "stem.proj_sym.weight"} & source.left.keys():
        return family, "X"
    return family, "H" if family == "vit" and "norm.weight" in source else "E"


def convert_authors_state_dict(state_dict: Mapping[str, Tensor], model_name: str) -> Tensors:
    """Converts the authors' state dict to that of flopeq's model, for `load_state_dict(strict=True)`.

    `model_name` is a name in flopeq (X, `flop_<X>`, `flophybrid_<X>` or `octichybrid_<X>`) of the checkpoint's family
    and variant. Widths, depths and image sizes are arbitrary. The authors have hybrids of the ViT only. Build the model
    with head="even+abs_odd" if they used `use_symmetrized_asym_feats`, a ConvNeXt with an `ls_init_value` if the
    checkpoint has LayerScale, and an octic hybrid with `octic_vits` (see `flopeq.hub.convert_octic`). The authors'
    `d2_inv_early_*` ViTs compute another function with the same tensors as their hybrids, so a state dict does not
    distinguish the two.

    Raises: ValueError for a model outside the study, a model of another kind than the checkpoint, missing or unknown
    tensors, frozen zeros that are not zero, and an order of tokens that differs from the authors'.
    """
    info = describe(model_name)
    if info is None:
        raise ValueError(f"{model_name!r} is not a model of the study{did_you_mean(model_name, MODELS)}")
    source = TensorSource(state_dict)
    kind = _identify(source)
    if kind != (info.family, info.variant):
        fitting = next(other.model for other in MODELS.values() if (other.family, other.variant) == kind)
        raise ValueError(
            f"the checkpoint holds {kind[1]}({kind[0]}), but {model_name} is {info.variant}({info.family}): "
            f"use a name such as {fitting}"
        )
    convert = convert_octic_vit if is_octic(source) else CONVERTERS[info.family]
    tensors = convert(source) | convert_linear(source, "head", "head")
    source.check_empty()
    return tensors


def load_authors_checkpoint(path: Path) -> Tensors:
    """Loads the state dict from a file of the authors, which has `model` or else `model_ema`, and `args`.

    Unpickles only tensors, plain containers and argparse.Namespace.
    Raises: ValueError if the file holds other objects, is not a checkpoint, or names one of the authors'
    `d2_inv_early_*` networks in `args`, which flopeq does not have; OSError if the file cannot be read.
    """
    damaged = f"{path} is not a file that torch.save wrote, or it is damaged"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            refused = f"{path} holds a {named[1]}, but only tensors and argparse.Namespace are unpickled"
            raise ValueError(refused) from error
        raise ValueError(damaged) from error
    except (RuntimeError, EOFError, LookupError) as error:
        raise ValueError(damaged) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    network = str(getattr(content.get("args"), "model", ""))
    if network.startswith("d2_inv_early_"):
        raise ValueError(f"{path} holds the authors' {network}, which flopeq does not have")
    state_dict = content.get("model", content.get("model_ema", content))
    if not isinstance(state_dict, dict) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(f"{path} holds no state dict under 'model' or 'model_ema'")
    return dict(state_dict)


def convert_checkpoint(source: Path, model_name: str, target: Path) -> Tensors:
    """Converts the authors' checkpoint to a safetensors file for flopeq's model of that name. Returns the tensors.

    The function reads the number of classes, image size, head and LayerScale from the tensors. It stores them as JSON
    in the file's metadata under `model_args`, for `timm.create_model(model_name, ...)`.
    Raises: ValueError as `load_authors_checkpoint` and `convert_authors_state_dict` do, and if width, depth or patch
    size differ from the model's.
    """
    try:
        tensors = convert_authors_state_dict(load_authors_checkpoint(source), model_name)
        model_args = infer_args(tensors, model_name)
        build(model_name, device="meta", **model_args).load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ValueError(f"{source} holds a network of another size than {model_name}: {first}") from error
    metadata = {"format": "pt", "model": model_name, "model_args": json.dumps(model_args)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target, metadata)
    return tensors


def infer_args(tensors: Tensors, model_name: str) -> dict[str, Any]:
    """Infers arguments of `timm.create_model` from the tensors. Assumes square images for ResMLPs."""
    info = MODELS[model_name]
    num_classes, num_features = tensors["head.weight"].shape
    args: dict[str, Any] = {"num_classes": num_classes}
    if info.variant in GROUP_VARIANTS:
        args |= infer_group_args(tensors, model_name, info.family)
        if "img_size" in args:
            return args
    stem = STEMS[info.family]
    if info.family == "convnext_iso":
        args["ls_init_value"] = 1e-6 if "blocks.0.gamma" in tensors else None
        if info.variant in GROUP_VARIANTS:
            return args
    kernel = tensors[f"{stem}.even" if f"{stem}.even" in tensors else f"{stem}.weight"]
    if info.variant == "E" and num_features == 2 * len(kernel):
        args["head"] = "even+abs_odd"
    if info.family == "convnext_iso":
        return args
    if "pos_embed.even" in tensors:
        even, odd = tensors["pos_embed.even"], tensors["pos_embed.odd"]
        grid = (even.shape[0], even.shape[1] + odd.shape[1])
    else:
        over_tokens = re.compile(r"pos_embed$|blocks\.0\.linear_tokens\.(even\.|odd\.)?weight$")
        num_tokens = sum(tensor.shape[1] for name, tensor in tensors.items() if over_tokens.match(name))
        grid = 2 * (math.isqrt(num_tokens),)
    return args | {"img_size": [kernel.shape[-2] * side for side in grid]}
