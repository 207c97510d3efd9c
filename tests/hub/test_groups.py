"""Weights of networks for larger groups, in and out: export, and arguments that are inferred from tensors."""

from __future__ import annotations

import json
import re

import pytest
import timm
import torch
from safetensors.torch import save_file

from flopeq.groups import D4, GROUPS
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


@pytest.mark.parametrize(
    ("case", "exact"),
    [
        ("c2xc2 vit", {"flop", "flip", "half turn"}),
        ("graded vit", {"flop"}),
        ("hybrid of c2xc2 vit", set()),
        ("d4 convnext_iso", {str(g) for g in D4.elements[1:]}),
    ],
)
def test_the_card_has_a_row_for_every_symmetry_of_the_first_block(case: str, exact: set[str], tmp_path) -> None:
    name, args, groups = GROUP_CASES[case]
    export_model(name, tmp_path, img_size=32, patch_size=4, **SMALL[MODELS[name].family] | args)
    assert _errors_in_card(tmp_path).keys() == {str(g) for g in GROUPS[groups[0]].elements[1:]}
    assert {g for g, error in _errors_in_card(tmp_path).items() if error < 1e-10} == exact


def test_the_card_of_an_invariant_octic_vit_has_all_eight_symmetries(tmp_path) -> None:
    args = SMALL["vit"] | {"img_size": 32, "patch_size": 8, "octic_vits": "invariant"}
    result = export_model("octichybrid_deit3_small_patch16_224", tmp_path, **args)
    errors = _errors_in_card(tmp_path)
    assert errors.keys() == {str(g) for g in D4.elements[1:]}
    assert max(errors.values()) < 1e-10 and result.equivariance_error < 1e-10


def _errors_in_card(folder) -> dict[str, float]:
    rows = re.findall(r"logits under the (.+), float64.* \| (\S+) \|", (folder / "README.md").read_text())
    return {symmetry: float(error) for symmetry, error in rows}
