"""Checkpoints of the paper's authors (github.com/georg-bn/flopping-for-flops) as checkpoints of our models.

What they call `sym` is even here, `asym` odd. Converted, the weights give the same function.
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

from flopeq.build import build, nearest
from flopeq.registry import MODELS, describe

__all__ = ["convert_authors_state_dict", "convert_checkpoint", "load_authors_checkpoint", "shown_args"]

Tensors = dict[str, Tensor]


class _Source:
    """The authors' tensors, each of which is to be taken once; what nobody takes is unknown."""

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        self.left = {_bare(name): tensor for name, tensor in state_dict.items()}
        blocks = [name.split(".")[1] for name in self.left if name.startswith("blocks.")]
        self.depth = 1 + max((int(index) for index in blocks if index.isdecimal()), default=-1)

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str) -> Tensor:
        """A tensor by the authors' name."""
        if name not in self.left:
            raise ValueError(f"the checkpoint lacks {name!r}: it is cut, or not one of the authors'")
        return self.left.pop(name)

    def take_scale(self, name: str) -> Tensor:
        """The scales of even and odd channels as one tensor, (C,)."""
        return torch.cat((self.take(f"{name}.alpha_sym"), self.take(f"{name}.alpha_asym")))

    def drop_zeros(self, name: str) -> None:
        """Leaves out a tensor that the authors keep at zero, and that we do not have."""
        if self.take(name).any():
            raise ValueError(f"{name!r} is frozen at zero in the authors' code, but not in this checkpoint")

    def check_empty(self) -> None:
        """Raises ValueError when tensors are left."""
        if self.left:
            some = ", ".join(sorted(self.left)[:5]) + (", ..." if len(self.left) > 5 else "")
            raise ValueError(f"{len(self.left)} tensors of the checkpoint have no place in the model: {some}")


def _bare(name: str) -> str:
    """A tensor's name without what torch.compile and DistributedDataParallel put before it."""
    while name.startswith(("_orig_mod.", "module.")):
        name = name.partition(".")[2]
    return name


def _ordinary(source: _Source, old: str, new: str) -> Tensors:
    """Weight and bias of an ordinary layer."""
    return {f"{new}.{part}": source.take(f"{old}.{part}") for part in ("weight", "bias")}


def _pointwise(source: _Source, old: str, new: str) -> Tensors:
    """A linear layer over channels, which the authors may have as a convolution of kernel size 1."""
    layer = _ordinary(source, old, new)
    return {name: tensor.flatten(1) if tensor.ndim > 1 else tensor for name, tensor in layer.items()}


def _affine(source: _Source, old: str, new: str) -> Tensors:
    """Scale and shift of X's ResMLP and of the head of E(ResMLP)."""
    return {f"{new}.{part}": source.take(f"{old}.{part}").reshape(1, 1, -1) for part in ("alpha", "beta")}


def _patches(source: _Source, old: str, new: str) -> Tensors:
    """Symmetric and antisymmetric patch kernels, of which both of us store the left half."""
    return {
        f"{new}.even": source.take(f"{old}.proj_sym.weight"),
        f"{new}.odd": source.take(f"{old}.proj_asym.weight"),
        f"{new}.bias": source.take(f"{old}.proj_sym.bias"),
    }


def _flop_linear(source: _Source, old: str, new: str) -> Tensors:
    """A block diagonal linear layer with a bias on the even half."""
    return {
        f"{new}.even.weight": source.take(f"{old}.linear_sym.weight").flatten(1),
        f"{new}.even.bias": source.take(f"{old}.linear_sym.bias"),
        f"{new}.odd.weight": source.take(f"{old}.linear_asym.weight").flatten(1),
    }


def _flop_norm(source: _Source, old: str, new: str) -> Tensors:
    weight, bias = source.take_scale(f"{old}.scaling"), source.take(f"{old}.scaling.beta")
    return {f"{new}.weight": weight, f"{new}.bias": bias}


def _grid_of(order: Tensor) -> tuple[int, int]:
    """Rows and columns of the grid whose tokens the authors order as left half, mirrored right half.

    Raises: ValueError for any other order; averaging integer tables (as an EMA of them does) leaves such.
    """
    num_tokens = len(order)
    width = int(order[num_tokens // 2]) + 1
    if width > 0 and num_tokens % width == 0 and width % 2 == 0:
        raster = torch.arange(num_tokens, device=order.device).view(-1, width)
        left, right = raster.chunk(2, dim=1)
        if torch.equal(order, torch.cat((left.flatten(), right.flip(1).flatten()))):
            return num_tokens // width, width
    raise ValueError("the checkpoint's order of tokens is not a grid's left half and then its mirrored right half")


def _vit(source: _Source) -> Tensors:
    if "cls_token" in source:
        stem = _ordinary(source, "patch_embed.proj", "patch_embed.proj")
        stem |= {name: source.take(name) for name in ("cls_token", "pos_embed")}
    else:
        height, _ = _grid_of(source.take("patch_embed.flatten_and_permute.permutation"))
        stem = _patches(source, "patch_embed", "patch_embed.proj")
        source.drop_zeros("cls_token.1")
        stem["cls_token"] = source.take("cls_token.0")
        for index, parity in enumerate(("even", "odd")):
            left_half = source.take(f"pos_embed.{index}")
            stem[f"pos_embed.{parity}"] = rearrange(left_half, "1 (H W) C -> H W C", H=height)
    blocks: Tensors = {}
    for index in range(source.depth):
        name = f"blocks.{index}"
        blocks |= (_flop_vit_block if f"{name}.norm1.scaling.beta" in source else _vit_block)(source, name)
    norm = _flop_norm if "norm.scaling.beta" in source else _ordinary
    return stem | blocks | norm(source, "norm", "norm")


def _vit_block(source: _Source, name: str) -> Tensors:
    block = {f"{name}.ls{index}.gamma": source.take(f"{name}.gamma_{index}") for index in (1, 2)}
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
        block |= _ordinary(source, f"{name}.{layer}", f"{name}.{layer}")
    return block


def _flop_vit_block(source: _Source, name: str) -> Tensors:
    block = {f"{name}.ls{index}.gamma": source.take_scale(f"{name}.gamma_{index}") for index in (1, 2)}
    for layer in ("norm1", "norm2"):
        block |= _flop_norm(source, f"{name}.{layer}", f"{name}.{layer}")
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        block |= _flop_linear(source, f"{name}.{layer}", f"{name}.{layer}")
    if f"{name}.attn.attn_mixer" in source:
        # An option of the authors' code weights the scores of the two parities: the queries take the weights.
        mixer = source.take(f"{name}.attn.attn_mixer")
        for part, weight in {"even.weight": mixer[0], "even.bias": mixer[0], "odd.weight": mixer[1]}.items():
            query, key, value = block[f"{name}.attn.qkv.{part}"].chunk(3)
            block[f"{name}.attn.qkv.{part}"] = torch.cat((weight * query, key, value))
    return block


def _resmlp(source: _Source) -> Tensors:
    if "patch_embed.proj_sym.weight" in source:
        table = "patch_embed.flatten_and_permute_to_fourier"
        _grid_of(torch.cat((source.take(f"{table}.left_idx"), source.take(f"{table}.right_idx"))))
        stem, block, norm = _patches(source, "patch_embed", "stem.proj"), _flop_resmlp_block, "fc_norm"
    else:
        stem, block, norm = _ordinary(source, "patch_embed.proj", "stem.proj"), _resmlp_block, "norm"
    blocks: Tensors = {}
    for index in range(source.depth):
        blocks |= block(source, f"blocks.{index}")
    return stem | blocks | _affine(source, "norm", norm)


def _resmlp_block(source: _Source, name: str) -> Tensors:
    block = {f"{name}.ls{index}": source.take(f"{name}.gamma_{index}") for index in (1, 2)}
    for layer in ("norm1", "norm2"):
        block |= _affine(source, f"{name}.{layer}", f"{name}.{layer}")
    for old, new in RESMLP_LINEAR.items():
        block |= _ordinary(source, f"{name}.{old}", f"{name}.{new}")
    return block


def _flop_resmlp_block(source: _Source, name: str) -> Tensors:
    block = {f"{name}.ls{index}": source.take_scale(f"{name}.gamma_{index}") for index in (1, 2)}
    for layer in (f"{name}.norm1", f"{name}.norm2"):
        # The authors' shifts are never applied in their forward: zero is the same function.
        unused = [source.take(f"{layer}.{shift}") for shift in ("beta_sym", "beta_asym")]
        block[f"{layer}.alpha"] = source.take_scale(layer).reshape(1, 1, -1)
        block[f"{layer}.beta"] = torch.zeros_like(torch.cat(unused)).reshape(1, 1, -1)
    for old, new in RESMLP_LINEAR.items():
        block |= _ordinary(source, f"{name}.{old}.lin_sym", f"{name}.{new}.even")
        block |= _ordinary(source, f"{name}.{old}.lin_asym", f"{name}.{new}.odd")
    return block


RESMLP_LINEAR = {"attn": "linear_tokens", "mlp.fc1": "mlp_channels.fc1", "mlp.fc2": "mlp_channels.fc2"}


def _convnext_iso(source: _Source) -> Tensors:
    is_flop = "stem.proj_sym.weight" in source
    tensors = (_patches if is_flop else _ordinary)(source, "stem", "stem")
    block = _flop_convnext_block if is_flop else _convnext_block
    for index in range(source.depth):
        tensors |= block(source, f"blocks.{index}")
    return tensors | _ordinary(source, "norm", "norm")


def _convnext_block(source: _Source, name: str) -> Tensors:
    block = _ordinary(source, f"{name}.dwconv", f"{name}.conv_dw")
    block |= _ordinary(source, f"{name}.norm", f"{name}.norm")
    for index in (1, 2):
        block |= _pointwise(source, f"{name}.pwconv{index}", f"{name}.mlp.fc{index}")
    if f"{name}.gamma" in source:
        block[f"{name}.gamma"] = source.take(f"{name}.gamma").flatten()
    return block


def _flop_convnext_block(source: _Source, name: str) -> Tensors:
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
        block[f"{name}.gamma"] = source.take_scale(f"{name}.gamma")
    return block


CONVERTERS: dict[str, Callable[[_Source], Tensors]] = {
    "vit": _vit,
    "resmlp": _resmlp,
    "convnext_iso": _convnext_iso,
}


def _kind(source: _Source) -> tuple[str, str]:
    """Family and variant of a checkpoint. Raises ValueError for what is none of the authors' networks."""
    roots = {name.partition(".")[0] for name in source.left}
    if "patch_embed" in roots:
        family = "vit" if "cls_token" in roots else "resmlp"
    elif "stem" in roots:
        family = "convnext_iso"
    else:
        names = ", ".join(sorted(source.left)[:3]) or "nothing"
        raise ValueError(f"no checkpoint of the authors' ViT, ResMLP or isotropic ConvNeXt: it holds {names}")
    if not {"patch_embed.proj_sym.weight", "stem.proj_sym.weight"} & source.left.keys():
        return family, "X"
    return family, "H" if family == "vit" and "norm.weight" in source else "E"


def convert_authors_state_dict(state_dict: Mapping[str, Tensor], model_name: str) -> Tensors:
    """The same network's state dict under our names, for `load_state_dict(strict=True)`.

    `model_name` is ours: X, `flop_<X>` or `flophybrid_<X>`, of the checkpoint's family and variant; widths, depths
    and image sizes may be any. The authors have hybrids of the ViT only. Build the model with head="even+abs_odd"
    where they used `use_symmetrized_asym_feats`, and a ConvNeXt with an `ls_init_value` where the checkpoint has
    LayerScale. Their `d2_inv_early_*` ViTs are another function with the tensors of their hybrids: nothing in a
    state dict tells them apart.

    Raises: ValueError for a model that is not in the study or of another kind than the checkpoint, for missing and
    unknown tensors, for frozen zeros that are not zero, and for an order of tokens that is not theirs.
    """
    info = describe(model_name)
    if info is None:
        raise ValueError(f"{model_name!r} is not a model of the study{nearest(model_name, MODELS)}")
    source = _Source(state_dict)
    kind = _kind(source)
    if kind != (info.family, info.variant):
        fitting = next(other.model for other in MODELS.values() if (other.family, other.variant) == kind)
        raise ValueError(
            f"the checkpoint holds {kind[1]}({kind[0]}), but {model_name} is {info.variant}({info.family}): "
            f"use a name such as {fitting}"
        )
    tensors = CONVERTERS[info.family](source) | _ordinary(source, "head", "head")
    source.check_empty()
    return tensors


def load_authors_checkpoint(path: Path) -> Tensors:
    """The state dict in a file as the authors publish it: `model`, or else `model_ema`, beside `args`.

    Nothing but tensors, plain containers and an argparse.Namespace is unpickled.
    Raises: ValueError for a file that holds other objects, that is no checkpoint, or whose `args` name one of
    their `d2_inv_early_*` networks, which are not among ours; OSError for a file that cannot be read.
    """
    damaged = f"{path} is not a file that torch.save wrote, or it is damaged"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            refused = f"{path} holds a {named[1]}, and is not unpickled: only tensors and argparse.Namespace are"
            raise ValueError(refused) from error
        raise ValueError(damaged) from error
    except (RuntimeError, EOFError, LookupError) as error:
        raise ValueError(damaged) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    network = str(getattr(content.get("args"), "model", ""))
    if network.startswith("d2_inv_early_"):
        raise ValueError(f"{path} holds the authors' {network}, which is not among ours")
    state_dict = content.get("model", content.get("model_ema", content))
    if not isinstance(state_dict, dict) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(f"{path} holds no state dict under 'model' or 'model_ema'")
    return dict(state_dict)


def convert_checkpoint(source: Path, model_name: str, target: Path) -> Tensors:
    """Writes the authors' checkpoint as safetensors that our model of that name loads; returns its tensors.

    Classes, image size, head and LayerScale are read from the tensors; the file's metadata hold them as
    `model_args`, JSON of what `timm.create_model(model_name, ...)` needs.
    Raises: ValueError as `load_authors_checkpoint` and `convert_authors_state_dict` do, and for another width,
    depth or patch size than the model's.
    """
    try:
        tensors = convert_authors_state_dict(load_authors_checkpoint(source), model_name)
        model_args = shown_args(tensors, model_name)
        build(model_name, device="meta", **model_args).load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ValueError(f"{source} holds a network of another size than {model_name}: {first}") from error
    metadata = {"format": "pt", "model": model_name, "model_args": json.dumps(model_args)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target, metadata)
    return tensors


def shown_args(tensors: Tensors, model_name: str) -> dict[str, Any]:
    """Arguments of `timm.create_model` that its tensors show. ResMLPs are taken to be of square images."""
    info = MODELS[model_name]
    num_classes, num_features = tensors["head.weight"].shape
    args: dict[str, Any] = {"num_classes": num_classes}
    stem = {"vit": "patch_embed.proj", "resmlp": "stem.proj", "convnext_iso": "stem"}[info.family]
    kernel = tensors[f"{stem}.weight" if info.variant == "X" else f"{stem}.even"]
    if info.variant == "E" and num_features == 2 * len(kernel):
        args["head"] = "even+abs_odd"
    if info.family == "convnext_iso":
        return args | {"ls_init_value": 1e-6 if "blocks.0.gamma" in tensors else None}
    if "pos_embed.even" in tensors:
        height, left_width = tensors["pos_embed.even"].shape[:2]
        grid = (height, 2 * left_width)
    else:
        over_tokens = re.compile(r"pos_embed$|blocks\.0\.linear_tokens\.(even\.|odd\.)?weight$")
        num_tokens = sum(tensor.shape[1] for name, tensor in tensors.items() if over_tokens.match(name))
        grid = 2 * (math.isqrt(num_tokens),)
    return args | {"img_size": [kernel.shape[-2] * side for side in grid]}
