"""The names that users import, run and read: they stay where they are."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import timm
import torch

import flopeq
import flopeq.testing
from flopeq.flops import complexity
from flopeq.irreps import SQRT_HALF, butterfly, change_basis, flop_grid, half, join, split
from flopeq.layers import (
    FlopAttention,
    FlopDepthwiseConv,
    FlopGELU,
    FlopLayerNorm,
    FlopLinear,
    FlopMlp,
    FlopPatchConv,
    FlopPatchEmbed,
    FlopPosEmbed,
)
from flopeq.testing import assert_equivariant, block_errors, equivariance_error
from pipeline.base.yaml_files import read_yaml

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
X = (
    "deit3_small_patch16_224", "deit3_base_patch16_224", "deit3_large_patch16_224", "deit3_huge_patch14_224",
    "resmlp_12_224", "resmlp_24_224", "resmlp_base_24_224", "resmlp_large_24_224",
    "convnext_iso_small", "convnext_iso_base", "convnext_iso_large",
)  # fmt: skip
STAGES = {
    "prepare", "shard", "recipe", "tuned", "train", "evaluate", "complexity", "throughput",
    "paper_sizes", "sweep_recipe", "sweep_hybrid", "scaling", "report",
}  # fmt: skip


def small_vit() -> torch.nn.Module:
    return timm.create_model("flop_deit3_small_patch16_224", **SMALL).eval()


@pytest.mark.parametrize("name", X)
def test_every_x_has_an_e_and_an_h_in_timm(name):
    assert timm.is_model(name) and timm.is_model(f"flop_{name}") and timm.is_model(f"flophybrid_{name}")


def test_the_package_has_its_names():
    assert len(flopeq.table1()) == 25 and flopeq.table1()[0].paper_name
    assert isinstance(flopeq.table1()[0], flopeq.Table1Row)
    assert flopeq.keep_freed_memory() in (True, False)
    assert flopeq.vit.FlopVisionTransformer and flopeq.resmlp and flopeq.convnext
    assert isinstance(flopeq.symmetrize(small_vit(), "flop", "average", "invariant", True), flopeq.Symmetrized)
    assert isinstance(flopeq.symmetrize_product(small_vit(), ("flop", "flip")), torch.nn.Module)
    assert flopeq.MultiView([small_vit()] * 2, ["c4", "flop"], fuse=sum).groups
    assert timm.is_model("symmetrized")
    with pytest.raises(ValueError):
        flopeq.convert_authors_state_dict({}, "flop_deit3_small_patch16_224")


def test_irreps_split_and_join():
    x = torch.randn(2, 4, 6)
    even, odd = split(x)
    assert torch.equal(join(even, odd), x) and half(6, "width") == 3
    assert torch.allclose(change_basis(change_basis(x)), x, atol=1e-6)
    assert torch.allclose(butterfly(even, odd)[0], SQRT_HALF * (even + odd))
    assert flop_grid(torch.randn(1, 4, 2, 3)).shape == (1, 4, 2, 3)


def test_layers_compute():
    x = torch.randn(2, 16, 8)
    assert FlopLinear(8, 12)(x).shape == (2, 16, 12)
    assert FlopLayerNorm(8)(x).shape == FlopGELU()(x).shape == FlopMlp(8, 16)(x).shape == x.shape
    assert FlopAttention(8, num_heads=2)(x).shape == x.shape
    image = torch.randn(1, 3, 16, 16)
    assert FlopPatchConv(3, 8, 4)(image).shape == (1, 8, 4, 4)
    assert FlopPatchEmbed(16, 4, 3, 8)(image).shape == (1, 16, 8)
    assert FlopPosEmbed((4, 4), 8)().shape == (1, 16, 8)
    assert FlopDepthwiseConv(8)(torch.randn(1, 8, 5, 5)).shape == (1, 8, 5, 5)


def test_testing_measures_equivariance():
    model, images = small_vit().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert equivariance_error(model, images) < 1e-12
    assert set(block_errors(model, images)) == {"blocks.0", "blocks.1"}
    assert_equivariant(model, images)


def test_flops_are_counted():
    counted = complexity(small_vit(), (3, 32, 32))
    assert counted.flops > counted.macs > 0 and counted.params > 0 and counted.elementwise > 0


def test_state_dict_names_stay():
    names = set(small_vit().state_dict())
    assert {"cls_token", "pos_embed.even", "pos_embed.odd", "patch_embed.proj.even", "patch_embed.proj.bias",
            "blocks.0.norm1.weight", "blocks.0.attn.qkv.even.weight", "blocks.0.attn.qkv.odd.weight",
            "blocks.0.attn.proj.even.bias", "blocks.0.mlp.fc1.even.weight", "blocks.0.ls1.gamma", "norm.bias",
            "head.weight"} <= names  # fmt: skip


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        (["list"], {"model", "paper_name", "family", "variant"}),
        (["complexity", "flop_deit3_small_patch16_224"], {"model", "params", "flops", "macs", "elementwise"}),
        (
            ["equivariance", "flop_deit3_small_patch16_224", "img_size=32", "patch_size=8", "depth=1"],
            {"model", "max_rel_error", "blocks"},
        ),
    ],
)
def test_the_command_line_prints_json_with_these_keys(root, command, keys):
    words = [sys.executable, "-m", "flopeq", *command, "--json"]
    rows = json.loads(subprocess.run(words, cwd=root, check=True, capture_output=True, text=True).stdout)
    assert rows and keys <= rows[0].keys()


def test_stages_and_sections_stay(root):
    assert set(read_yaml(root / "dvc.yaml")["stages"]) >= STAGES
    sections = {"data", "models", "recipes", "train", "throughput", "sweeps", "tracking", "storage", "seed"}
    assert set(read_yaml(root / "params.yaml")) >= sections
