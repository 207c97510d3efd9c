"""Writes octic_networks.json with tensor names, shapes, features and logits of small networks of octic-vits.

    python -m tests.hub.authors.make_octic_fixture --authors PATH --commit COMMIT

PATH is a checkout of github.com/davnords/octic-vits. Its GELU is a Triton kernel, so a stand-in computes it with their
own functions in plain torch, and the networks run on a CPU. Weights and images come from `drawn`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from tests.hub.authors.make_fixture import draw_weights, images

FIXTURE = Path(__file__).with_name("octic_networks.json")

TOKENS = (0, 3)
"""The class token and one other. The fixture has the features of these tokens, for the first image."""

SIZE = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 32, "num_heads": 2, "depth": 2}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "H8": ("octichybrid_deit3_large_patch16_224", SIZE),
    "H8, late": ("octichybrid_deit3_huge_patch14_224",
                 SIZE | {"img_size": 36, "patch_size": 6, "depth": 3, "octic_equi_break_layer": 2}),
    "I8": ("octichybrid_deit3_large_patch16_224", SIZE | {"invariant": True}),
    "I8, early": ("octichybrid_deit3_huge_patch14_224",
                  SIZE | {"img_size": 36, "patch_size": 6, "invariant": True, "octic_equi_break_layer": 1}),
}  # fmt: skip


class PlainGelu(nn.Module):
    """The result of their Triton kernel: GELU in the regular basis, by their own functions."""

    def forward(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        layers, bases = (importlib.import_module(f"octic_vits.{name}") for name in ("d8_layers", "d8_utils"))
        return bases.convert_8tuple_to_5tuple(layers.GeluD8()(bases.convert_5tuple_to_8tuple(parts)))


def stand_in_for_triton(authors: Path) -> None:
    """Replaces the file with the Triton kernels, and makes the authors' code importable."""
    kernels = types.ModuleType("octic_vits.d8_gelu")
    kernels.TritonGeluD8 = PlainGelu
    sys.modules[kernels.__name__] = kernels
    sys.path.insert(0, str(authors))


def authors_network(args: dict[str, Any]) -> nn.Module:
    """Builds a network with the blocks and the bias of the authors' registered DeiT III sizes."""
    code, blocks = importlib.import_module("octic_vits.model"), importlib.import_module("octic_vits.deit_models")
    layers = {
        "standard_block_layers": blocks.Layer_scale_init_Block,
        "octic_block_layers": blocks.Layer_scale_init_BlockD8,
    }
    return code.OcticVisionTransformer(qkv_bias=True, **layers, **args).double().eval()


@torch.no_grad()
def features_and_logits(network: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """The tokens after each block, with irreps concatenated as the authors do before an ordinary block, and logits."""
    bases = importlib.import_module("octic_vits.d8_utils")
    features: list[Tensor] = []

    def keep(module: nn.Module, args: Any, result: Tensor | tuple[Tensor, ...]) -> None:
        if isinstance(result, tuple):
            result = torch.cat(bases.convert_5tuple_to_8tuple(result), -1)
        features.append(result)

    for block in network.blocks:
        block.register_forward_hook(keep)
    logits = network(x)
    return features, logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--authors", type=Path, required=True, help="a checkout of the authors' repository")
    parser.add_argument("--commit", default="unknown", help="the checkout's commit, to be noted in the fixture")
    options = parser.parse_args()
    stand_in_for_triton(options.authors.resolve())
    networks = {}
    for case, (model, args) in CASES.items():
        network = authors_network(args)
        frozen = draw_weights(network)
        assert not any(tensor.any() for tensor in frozen.values())
        features, logits = features_and_logits(network, images(args["img_size"]))
        networks[case] = {
            "model": model,
            "authors_args": args,
            "shapes": {name: list(tensor.shape) for name, tensor in network.state_dict().items()},
            "frozen": list(frozen),
            "features": [tokens[0, list(TOKENS)].tolist() for tokens in features],
            "logits": logits.tolist(),
        }
    versions = {"torch": torch.__version__.partition("+")[0], "timm": timm.__version__}
    head = json.dumps({"commit": options.commit, "versions": versions}, indent=1)[:-2]
    rows = ",\n".join(f"  {json.dumps(case)}: {json.dumps(row)}" for case, row in networks.items())
    FIXTURE.write_text(f'{head},\n "networks": {{\n{rows}\n }}\n}}\n')


if __name__ == "__main__":
    main()
