"""Weights from a file: the authors', ours, and those that do not fit."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flopeq.hub.convert import convert_checkpoint
from flopeq.models.build import build
from pipeline.base import errors, schema
from pipeline.evaluation import evaluate
from pipeline.evaluation.weights import WeightsError, load_weights
from stages import evaluate_weights, run_stage
from tests.evaluation.conftest import (
    ROOT,
    WNIDS,
    assert_same,
    evaluate_one_by_one,
    experiment,
    random_network,
    save_outputs,
)
from tests.hub import test_convert_octic
from tests.hub.test_convert import NETWORKS, authors_weights, ours

PUBLISHED = NETWORKS["E(ViT), fused"]


PUBLISHED_ARGS = {"patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2}
"""What the weights of that network do not show."""


@pytest.fixture
def published(place: Path) -> Path:
    """A checkpoint as the authors publish it."""
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in authors_weights(PUBLISHED).items()}
    args = argparse.Namespace(model="inv_deit_base_patch16_LS", drop_path=0.1)
    torch.save({"model": wrapped, "epoch": 399, "args": args}, place / "published.pth")
    return place / "published.pth"


def format_args(args: dict[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in args.items()]


def run_stage_process(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stages.evaluate_weights", *words],
        text=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )


def test_the_authors_file_is_measured_by_one_command(published: Path) -> None:
    settings = experiment(further_val={"again": "source/val"})
    done = run_stage_process(str(published), PUBLISHED["model"], *format_args(PUBLISHED_ARGS))
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    expected = evaluate_one_by_one(ours(PUBLISHED).float(), settings, Path("source/val"), WNIDS.index)
    assert metrics["val/top1_pct"] == pytest.approx(expected["top1_pct"]) == metrics["again/top1_pct"]
    assert_same(metrics, expected, "val/")
    assert metrics["val/flop_agreement_pct"] == 100 and metrics["equivariance/max_rel_error"] < 1e-4
    assert not Path("outputs").exists()


def test_weights_of_ours_are_measured_as_their_run_is(place: Path, logged: dict[str, float]) -> None:
    settings = experiment()
    save_outputs("e-vit", weights=random_network(settings, "e-vit", seed=1))
    run_metrics = evaluate.evaluate_run(settings, "e-vit")
    args = {name: value for name, value in settings.run("e-vit").args.items() if name != "img_size"}
    path = Path("outputs/e-vit/weights.safetensors")
    file_metrics = evaluate.evaluate_weights(settings, path, settings.run("e-vit").model, args)
    assert run_metrics == {**file_metrics, "converged": run_metrics["converged"]}


def test_a_published_file_and_its_conversion_are_the_same(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, model = experiment(), PUBLISHED["model"]
    monkeypatch.setattr("flopeq.hub.convert.build", lambda name, device, **args: nn.Identity())
    monkeypatch.setattr(nn.Identity, "load_state_dict", lambda *args, **kwargs: None)
    convert_checkpoint(published, model, Path("ours.safetensors"))
    metrics = [evaluate.evaluate_weights(settings, path, model, PUBLISHED_ARGS)
             for path in (published, Path("ours.safetensors"))]  # fmt: skip
    assert metrics[0] == metrics[1]
    with pytest.raises(WeightsError, match="holds the weights of a flop_deit3_base_patch16_224, not of a "):
        evaluate.evaluate_weights(settings, Path("ours.safetensors"), "deit3_base_patch16_224", {})


def test_weights_of_octic_vits_give_its_logits(tmp_path: Path) -> None:
    network = test_convert_octic.NETWORKS["H8, late"]
    torch.save({"model": test_convert_octic.authors_weights(network)}, tmp_path / "octic.pth")
    args = {name: value for name, value in test_convert_octic.our_args(network).items() if name != "img_size"}
    model = load_weights(tmp_path / "octic.pth", network["model"], args, num_classes=5, image_size=36)
    assert test_convert_octic.error_of(model.eval(), network, torch.float32) <= 1e-4


@pytest.mark.parametrize("args", [{}, {"num_group_blocks": 1}, {"symmetry": "d4:1"}])
def test_the_groups_of_blocks_may_be_given_or_inferred(tmp_path: Path, args: dict[str, Any]) -> None:
    name, size = "octic_deit3_small_patch16_224", {"embed_dim": 32, "depth": 3, "num_heads": 2}
    model = build(name, num_classes=5, img_size=32, symmetry="d4:1", **size)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    loaded = load_weights(tmp_path / "w.safetensors", name, size | args, num_classes=5, image_size=32)
    assert [group.name for group in loaded.block_groups] == ["d4", "trivial", "trivial"]


@pytest.mark.parametrize(("changes", "model", "args", "message"), [
    ({"name": "imagenet", "labels": "imagenet"}, None, {}, "has 5 classes, but the data .* has 1000"),
    ({"image_size": 32}, None, {}, "for images of 48 x 48 pixels, but data.image_size is 32"),
    ({}, None, {"embed_dim": 32}, "does not fit flop_deit3_base_patch16_224 .*embed_dim=32.*: size mismatch for"),
    ({}, None, {"num_classes": 5}, "num_classes comes from the data"),
    ({}, "flop_resmlp_24_224", {}, "use a name such as flop_deit3_small_patch16_224"),
    ({}, "resnet18", {}, "'resnet18' is not a model of the study"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused(
    published: Path, changes: dict[str, Any], model: str | None, args: dict[str, Any], message: str
) -> None:
    settings = experiment()
    settings = settings.model_copy(update={"data": settings.data.model_copy(update=changes)})
    with pytest.raises(WeightsError, match=message):
        evaluate.evaluate_weights(settings, published, model or PUBLISHED["model"], PUBLISHED_ARGS | args)


def test_a_file_that_holds_no_weights_is_refused(place: Path) -> None:
    settings, model = experiment(), PUBLISHED["model"]
    for name in ("no.pth", "no.safetensors"):
        with pytest.raises(WeightsError, match=name):
            evaluate.evaluate_weights(settings, place / name, model, {})
        (place / name).write_bytes(b"hello")
        with pytest.raises(WeightsError, match=name):
            evaluate.evaluate_weights(settings, place / name, model, {})
    save_file({"fc.weight": torch.ones(5, 3)}, place / "other.safetensors")
    with pytest.raises(WeightsError, match="lacks 'head.weight': it does not hold the weights of a flop_deit3_base"):
        evaluate.evaluate_weights(settings, place / "other.safetensors", model, {})


def test_the_test_crop_is_that_of_the_models_runs(published: Path) -> None:
    settings, model = experiment(), PUBLISHED["model"]
    other = settings.recipes["digits"].model_copy(update={"test_crop_ratio": 1.0})
    settings = settings.model_copy(update={"recipes": {**settings.recipes, "other": other}})
    with pytest.raises(errors.ConfigError, match="test_crop_ratio 0.875 and 1.0, and the one for"):
        evaluate.evaluate_weights(settings, published, model, PUBLISHED_ARGS)
    losses = []
    for recipe_name in ("digits", "other"):
        runs = {**settings.models, "published": schema.Run(model=model, recipe=recipe_name)}
        chosen = settings.model_copy(update={"models": runs})
        losses.append(evaluate.evaluate_weights(chosen, published, model, PUBLISHED_ARGS)["val/loss"])
    assert losses[0] != losses[1]


@pytest.mark.parametrize(("given", "message"), [
    (["published.pth"], "usage: python -m stages.evaluate_weights FILE MODEL"),
    (["published.pth", PUBLISHED["model"], "depht=2"], "did you mean 'depth'?"),
    (["missing.pth", PUBLISHED["model"]], "missing.pth"),
])  # fmt: skip
@pytest.mark.usefixtures("published")
def test_mistakes_on_the_command_line_are_told_without_a_traceback(
    given: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment()
    monkeypatch.setattr(sys, "argv", ["evaluate_weights", *given])
    with pytest.raises(SystemExit) as left:
        run_stage(evaluate_weights.run)
    printed = capsys.readouterr()
    assert left.value.code == 2 and not printed.out
    assert printed.err.startswith("error: ") and message in printed.err
