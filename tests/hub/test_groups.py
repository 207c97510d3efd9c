"""Weights of networks for larger groups, in and out: export, and arguments that are inferred from tensors."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from flopeq.hub.convert import infer_args
from flopeq.hub.export import export_model
from flopeq.registry import MODELS
from tests.models.conftest import GROUP_CASES, SMALL, random_images, small_group_model


@pytest.mark.parametrize("case", GROUP_CASES)
def test_an_exported_folder_loads_with_timm_and_its_card_names_the_group(case: str, tmp_path) -> None:
    name, args, groups = GROUP_CASES[case]
    model, sizes = small_group_model(case, (32, 32), patch_size=4).float(), SMALL[MODELS[name].family]
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    result = export_model(name, tmp_path / "out", checkpoint=tmp_path / "w.safetensors", img_size=32, **sizes | args)
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = random_images((32, 32)).float()
    assert torch.equal(again(x), model(x))
    assert (result.equivariance_error < 1e-10) == (groups[-1] != "trivial")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "symmetries of the square" in card or "horizontal and vertical" in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]["patch_size"] == [4, 4]


@pytest.mark.parametrize(
    ("case", "head", "inferred"),
    [
        ("d4 vit", "power", {}),
        ("d4 vit", "trivial", {"head": "trivial"}),
        ("c2xc2 vit", "trivial", {"head": "trivial"}),
        ("graded vit", "trivial", {"symmetry": "d4:1,c2xc2:1,c2:1"}),
        ("graded vit", "power", {"symmetry": "d4:1,c2xc2:1,c2:1", "head": "power"}),
        ("hybrid of d4 vit", None, {}),
        ("d4 resmlp", "power", {}),
        ("c2xc2 resmlp", "trivial", {"head": "trivial"}),
    ],
)
@pytest.mark.parametrize("image", [(32, 32), (40, 40)])
def test_arguments_are_inferred_from_tensors(case: str, head: str | None, inferred: dict, image) -> None:
    model = small_group_model(case, image, **{"head": head} if head else {})
    found = infer_args(dict(model.state_dict()), GROUP_CASES[case][0])
    assert found == {"num_classes": 5, "img_size": list(image)} | inferred


@pytest.mark.parametrize(
    ("case", "head", "inferred"),
    [
        ("d4 convnext_iso", "power", {}),
        ("d4 convnext_iso", "trivial", {"head": "trivial"}),
        ("c2xc2 convnext_iso", "trivial", {"head": "trivial"}),
        ("graded convnext_iso", "trivial", {"symmetry": "d4:1,c2xc2:1,c2:1"}),
        ("graded convnext_iso", "power", {"symmetry": "d4:1,c2xc2:1,c2:1", "head": "power"}),
        ("hybrid of d4 convnext_iso", None, {}),
    ],
)
def test_arguments_of_a_convnext_are_inferred_from_tensors(case: str, head: str | None, inferred: dict) -> None:
    for ls_init_value in (1e-6, None):
        model = small_group_model(case, ls_init_value=ls_init_value, **{"head": head} if head else {})
        found = infer_args(dict(model.state_dict()), GROUP_CASES[case][0])
        assert found == {"num_classes": 5, "ls_init_value": ls_init_value} | inferred
