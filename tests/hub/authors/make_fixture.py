"""Writes networks.json with tensor names, shapes and logits of small networks in the authors' code.

    python tests/hub/authors/make_fixture.py --authors PATH

PATH is a checkout of github.com/georg-bn/flopping-for-flops. Its code runs on a CPU with the current timm. Weights and
images come from `drawn`, so the tests can compute them again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import types
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

FIXTURE = Path(__file__).with_name("networks.json")


def drawn(name: str, shape: tuple[int, ...] | list[int]) -> Tensor:
    """Pseudorandom weights that depend on the name: uniform on (-1/2, 1/2), float64.

    Integer arithmetic makes them equal on every machine:
    x = i*2654435761 + crc32(name), then twice x = (x ^ x>>16)*73244475, then x ^ x>>16, all modulo 2^32.
    """
    x = torch.arange(torch.Size(shape).numel()) * 2654435761 + zlib.crc32(name.encode())
    x = x % 2**32
    for _ in range(2):
        x = (x ^ (x >> 16)) * 73244475 % 2**32
    return ((x ^ (x >> 16)).double() / 2**32 - 0.5).reshape(shape)


def images(img_size: int | list[int]) -> Tensor:
    """Two images, (2, 3, H, W), from `drawn`."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return 4 * drawn("images", (2, 3, height, width))


VIT = {"img_size": 48, "patch_size": 8, "num_classes": 5, "embed_dim": 24, "num_heads": 2, "depth": 2}

WIDE = {"img_size": [24, 48]}

RESMLP = {"img_size": 48, "patch_size": 8, "num_classes": 5, "embed_dim": 20, "depth": 2}

CONVNEXT = {"img_size": [64, 48], "num_classes": 5, "dim": 24, "depth": 2}

LAYER_SCALE = {"layer_scale_init_value": 1.0}

ABS_ODD = {"use_symmetrized_asym_feats": True}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "X(ViT)": ("deit3_small_patch16_224", "deit.models.vit.vit_models", VIT),
    "E(ViT)": ("flop_deit3_small_patch16_224", "deit.models.d2_vit.d2_vit_models", VIT | WIDE),
    "E(ViT), fused": ("flop_deit3_base_patch16_224", "deit.models.d2_vit.d2_vit_models",
                      VIT | {"use_fused_attn": True}),
    "E(ViT), |odd|": ("flop_deit3_large_patch16_224", "deit.models.d2_vit.d2_vit_models", VIT | ABS_ODD),
    "E(ViT), mixer": ("flop_deit3_huge_patch14_224", "deit.models.d2_vit.d2_vit_models",
                      VIT | {"use_attn_mixer": True, "patch_size": 6}),
    "H(ViT)": ("flophybrid_deit3_small_patch16_224", "deit.models.hybrid.hybrid_vit_models",
               VIT | {"depth": 3}),
    "X(ResMLP)": ("resmlp_base_24_224", "deit.models.resmlp.resmlp_models", RESMLP),
    "E(ResMLP)": ("flop_resmlp_24_224", "deit.models.d2_resmlp.resmlp_models_equi_d2_22rep", RESMLP),
    "E(ResMLP), |odd|": ("flop_resmlp_12_224", "deit.models.d2_resmlp.resmlp_models_equi_d2_22rep",
                         RESMLP | ABS_ODD),
    "X(ConvNeXt)": ("convnext_iso_small", "convnext.models.convnext_isotropic.ConvNeXtIsotropic", CONVNEXT),
    "X(ConvNeXt), scaled": ("convnext_iso_large", "convnext.models.convnext_isotropic.ConvNeXtIsotropic",
                            CONVNEXT | LAYER_SCALE),
    "E(ConvNeXt)": ("flop_convnext_iso_small", "convnext.models.d2_convnext_isotropic.ConvNeXtIsotropic2",
                    CONVNEXT),
    "E(ConvNeXt), scaled": ("flop_convnext_iso_large",
                            "convnext.models.d2_convnext_isotropic.ConvNeXtIsotropic2",
                            CONVNEXT | LAYER_SCALE),
    "E(ConvNeXt), |odd|": ("flop_convnext_iso_base",
                           "convnext.models.d2_convnext_isotropic.ConvNeXtIsotropic2",
                           CONVNEXT | LAYER_SCALE | ABS_ODD),
}  # fmt: skip


def stand_in_for_old_timm(authors: Path) -> None:
    """Makes the authors' imports work: adds timm's modules under their old names, and disables registration."""
    registry, layers = types.ModuleType("timm.models.registry"), types.ModuleType("timm.models.layers")
    registry.register_model = lambda entry_point: entry_point
    for name in ("trunc_normal_", "DropPath", "to_2tuple"):
        setattr(layers, name, getattr(timm.layers, name))
    sys.modules |= {registry.__name__: registry, layers.__name__: layers}
    sys.path.insert(0, str(authors))


def authors_network(path: str, args: dict[str, Any]) -> nn.Module:
    """Builds a network of the authors' code. ViTs get the layers of the authors' registered sizes."""
    module, _, name = path.rpartition(".")
    code = importlib.import_module(module)
    extra: dict[str, Any] = {}
    if "vit" in name:
        extra = {"qkv_bias": True}
    if name == "vit_models":
        extra |= {"block_layers": code.Layer_scale_init_Block, "norm_layer": partial(nn.LayerNorm, eps=1e-6)}
    elif name == "d2_vit_models":
        extra |= {"norm_layer": partial(code.LayerNorm2v2, eps=1e-6)}
    return getattr(code, name)(**args, **extra).double().eval()


def draw_weights(network: nn.Module) -> dict[str, Tensor]:
    """Sets every trainable weight with `drawn`. Returns the frozen weights, which it does not change."""
    frozen = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            parameter.data = drawn(name, parameter.shape)
        else:
            frozen[name] = parameter.data
    return frozen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--authors", type=Path, required=True, help="a checkout of the authors' repository")
    authors = parser.parse_args().authors.resolve()
    stand_in_for_old_timm(authors)
    show = ["git", "-C", str(authors), "rev-parse", "HEAD"]
    commit = subprocess.run(show, capture_output=True, text=True).stdout.strip() or "unknown"
    networks = {}
    for case, (model, path, args) in CASES.items():
        network = authors_network(path, args)
        frozen = draw_weights(network)
        with torch.no_grad():
            logits = network(images(args["img_size"]))
        networks[case] = {
            "model": model,
            "authors_class": path,
            "authors_args": args,
            "shapes": {name: list(tensor.shape) for name, tensor in network.state_dict().items()},
            "frozen": {
                name: tensor.tolist() if tensor.dtype == torch.int64 else 0.0
                for name, tensor in frozen.items()
                if tensor.dtype == torch.int64 or not tensor.any()
            },
            "logits": logits.tolist(),
        }
        assert frozen.keys() == networks[case]["frozen"].keys()
    versions = {"torch": torch.__version__.partition("+")[0], "timm": timm.__version__}
    head = json.dumps({"commit": commit, "versions": versions}, indent=1)[:-2]
    rows = ",\n".join(f"  {json.dumps(case)}: {json.dumps(row)}" for case, row in networks.items())
    FIXTURE.write_text(f'{head},\n "networks": {{\n{rows}\n }}\n}}\n')


if __name__ == "__main__":
    main()
