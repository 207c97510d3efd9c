"""The arguments of networks for larger groups are inferred from their weights."""

from __future__ import annotations

from typing import Any

import pytest

from flopeq.hub.convert import infer_args
from flopeq.models.build import build

SIZE = {"embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("octic_deit3_small_patch16_224", {"img_size": [224, 224]}),
        ("octic_deit3_base_patch16_224", {"img_size": [48, 48], "head": "trivial"}),
        ("octic_deit3_small_patch16_224", {"img_size": [48, 48], "symmetry": "d4:1,c2xc2:1,c2:1"}),
        ("octic_deit3_small_patch16_224", {"img_size": [48, 48], "symmetry": "d4:2,c2:1", "head": "power"}),
        ("octichybrid_deit3_huge_patch14_224", {"img_size": [42, 42]}),
        ("octichybrid_deit3_huge_patch14_224", {"img_size": [42, 42], "symmetry": "d4:2,x:1", "octic_vits": "hybrid"}),
        ("octichybrid_deit3_large_patch16_224", {"img_size": [32, 32], "octic_vits": "invariant"}),
        ("mirrors_deit3_small_patch16_224", {"img_size": [48, 32]}),
        ("mirrorshybrid_deit3_small_patch16_224", {"img_size": [48, 32], "symmetry": "c2xc2:1,c2:1,x:1"}),
        ("mirrors_deit3_small_patch16_224", {"img_size": [48, 48], "symmetry": "c2:2,x:1"}),
        ("mirrors_deit3_small_patch16_224", {"img_size": [48, 48], "symmetry": "c2:3", "head": "power"}),
        ("octic_deit3_small_patch16_224", {"img_size": [48, 48], "symmetry": "x:3"}),
    ],
)
def test_what_differs_from_the_defaults_is_inferred(name: str, args: dict[str, Any]) -> None:
    model = build(name, device="meta", **SIZE, **args)
    assert infer_args(model.state_dict(), name) == args | {"num_classes": 5}
