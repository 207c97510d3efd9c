"""benchmarks/symmetrization.py: its designs are what the library computes, and a small run of it makes its tables."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks import symmetrization, view_classification
from benchmarks.saved_predictions import SavedPredictions
from benchmarks.view_networks import DESIGNS, GROUP, Head, SharedFullProduct, build_network, fuse
from flopeq.models.build import build
from pipeline.base.yaml_files import dump_yaml
from tests.packing import layouts

ARGS: dict[str, Any] = {"img_size": 28, "patch_size": 14, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    torch.manual_seed(0)
    return build("deit3_small_patch16_224", num_classes=0, **ARGS).double().eval()


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    return list(torch.randn(2, 3, 3, 28, 28, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


@pytest.mark.parametrize("design", DESIGNS)
def test_a_design_on_features_is_the_complete_network(
    design: Any, encoder: nn.Module, images: list[torch.Tensor]
) -> None:
    head = Head(2, 16, 10).double().eval()
    features_BNGC = torch.stack([torch.stack([encoder(g(x)) for g in GROUP], 1) for x in images], 1)
    expected = build_network(encoder, head, design)(*images)
    torch.testing.assert_close(fuse(head, features_BNGC, design), expected, rtol=0, atol=1e-12)
    if design == "full product":
        torch.testing.assert_close(SharedFullProduct(encoder, head)(*images), expected, rtol=0, atol=1e-12)
    turned = build_network(encoder, head, design)(GROUP[1](images[0]), GROUP[3](images[1]))
    is_invariant = torch.allclose(turned, expected, rtol=0, atol=1e-10)
    assert is_invariant == (design != "plain")


def test_turned_features_are_those_of_turned_images(encoder: nn.Module, images: list[torch.Tensor]) -> None:
    features_TNGC = torch.stack([torch.stack([encoder(g(x)) for g in GROUP], 1) for x in images], 1)
    turned = view_classification._turn(features_TNGC, torch.Generator().manual_seed(1))
    turns = torch.randint(4, (3, 2), generator=torch.Generator().manual_seed(1))
    assert len(turns.unique()) > 2
    for image in range(3):
        for view in range(2):
            x = GROUP[turns[image, view]](images[view][image : image + 1])
            expected = torch.cat([encoder(g(x)) for g in GROUP])
            torch.testing.assert_close(turned[image, view], expected, rtol=0, atol=1e-12)


def test_tuples_are_of_one_class_and_share_no_image() -> None:
    labels = torch.arange(10).repeat(7)
    tuples = view_classification.disjoint_tuples(labels, 3)
    assert tuples.shape == (20, 3) and tuples.unique().numel() == 60
    assert (labels[tuples] == labels[tuples[:, :1]]).all()


def test_predictions_of_other_settings_are_refused(tmp_path: Path) -> None:
    SavedPredictions(tmp_path / "a.npz", {"steps": 1}).add(one=np.array([3], np.uint8))
    assert SavedPredictions(tmp_path / "a.npz", {"steps": 1})["one"].tolist() == [3]
    with pytest.raises(ValueError, match="has the results of other settings"):
        SavedPredictions(tmp_path / "a.npz", {"steps": 2})


def make_study(folder: Path) -> tuple[Path, Path]:
    """Random images in IDX files, and the folders of an untrained X and E."""
    rng = np.random.default_rng(0)
    pixels = {split: rng.integers(0, 256, (60, 28, 28), np.uint8) for split in ("train", "val")}
    data = layouts.idx_files(pixels, {s: np.arange(60, dtype=np.uint8) % 10 for s in pixels}, folder / "data", ".gz")
    for run, model in (("vit", "deit3_small_patch16_224"), ("e-vit", "flop_deit3_small_patch16_224")):
        torch.manual_seed(0)
        target = folder / "outputs" / run
        target.mkdir(parents=True)
        save_file(build(model, num_classes=10, **ARGS).state_dict(), target / "weights.safetensors")
        described = {"model": model, "args": ARGS, "data": {"mean": [0.3] * 3, "std": [0.3] * 3}}
        (target / "config.yaml").write_text(dump_yaml(described))
    return folder / "outputs", data


def test_a_small_run_makes_its_tables_and_a_second_one_computes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outputs, data = make_study(tmp_path)
    out = tmp_path / "results"
    words = f"--outputs {outputs} --data {data} --out {out} --threads 1 --timed-passes 2"
    settings = [
        '{"num_images": 20, "num_train_images": 20}',
        '{"num_train_images": 60, "num_val_images": 60, "steps": 2}',
    ]
    monkeypatch.setattr(view_classification, "NUM_IMAGES", (2,))
    monkeypatch.setattr(
        sys, "argv", ["symmetrization", *words.split(), "--robustness", settings[0], "--views", settings[1]]
    )
    with caplog.at_level("INFO"):
        symmetrization.main()
    assert "robustness 20/20" in caplog.text and "views 3/3" in caplog.text
    tables = (out / "tables.md").read_text()
    assert "| vit | S(X), choose | – |" in tables and "| 2 | full product | 32 |" in tables
    rows = (out / "robustness.csv").read_text().splitlines()[1:]
    assert all(row.split(",")[-1] == "0" for row in rows if '"S(X), average"' in row), "it is invariant"
    assert {path.name for path in out.iterdir()} >= {"robustness.png", "views.png", "view_costs.csv", "run.json"}
    caplog.clear()
    with caplog.at_level("INFO"):
        symmetrization.main()
    assert "robustness 1/" not in caplog.text and "features of" not in caplog.text
    assert (out / "robustness.csv").read_text().splitlines()[1:] == rows
