"""What evaluation says of weights is what counting one image after the other gives, on every set it is asked for."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from flopeq.groups import D4
from flopeq.models.build import build
from pipeline.base import errors, imagenet
from pipeline.evaluation import evaluate, predictions, statistics
from pipeline.loading import batching
from pipeline.shards import manifests
from tests.evaluation.conftest import (
    WNIDS,
    assert_same,
    constant_network,
    evaluate_one_by_one,
    experiment,
    random_network,
    save_outputs,
)
from tests.models.conftest import randomize_parameters


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_every_validation_image_counts_once(place: Path, logged: dict[str, float], loader_workers: int) -> None:
    settings = experiment(loader_workers=loader_workers)
    model = random_network(settings, "vit", seed=1)
    save_outputs("vit", weights=model)
    metrics = evaluate.evaluate_run(settings, "vit")
    expected = evaluate_one_by_one(model, settings, Path("source/val"), WNIDS.index)
    assert {"val/top1_pct", "val/top5_pct", "val/loss"} <= metrics.keys()
    assert_same(metrics, expected, "val/")
    assert metrics == json.loads(Path("outputs/vit/metrics.json").read_text())
    assert metrics.keys() == {"val/top1_pct", "val/top1_low_pct", "val/top1_high_pct", "val/top5_pct", "val/loss",
                              "val/flop_agreement_pct", "equivariance/max_rel_error", "converged"}  # fmt: skip
    bounds = statistics.wilson_interval(round(15 * metrics["val/top1_pct"] / 100), 15).scaled(100)
    assert (metrics["val/top1_low_pct"], metrics["val/top1_high_pct"]) == bounds
    assert logged.keys() == {"val/flop_agreement_pct", "equivariance/max_rel_error"}


@pytest.mark.usefixtures("logged")
def test_predictions_of_every_image_are_kept_in_the_order_of_the_index(place: Path) -> None:
    settings = experiment()
    save_outputs("vit", weights=random_network(settings, "vit", seed=1))
    metrics = evaluate.evaluate_run(settings, "vit")
    index = pq.read_table(settings.data.shards / "val.index.parquet")
    kept = pq.read_table("outputs/vit/predictions.parquet")
    assert kept.column_names == ["key", "label", "top1", "loss"]
    assert kept["key"].to_pylist() == index["key"].to_pylist()
    assert kept["label"].to_pylist() == index["label"].to_pylist()
    hits = kept["top1"].to_numpy() == kept["label"].to_numpy()
    assert 100 * hits.mean() == pytest.approx(metrics["val/top1_pct"]) and 0 < hits.mean() < 1
    assert kept["loss"].to_numpy().mean() == pytest.approx(metrics["val/loss"])
    found = predictions.read_hits(Path("outputs/vit"))
    assert found is not None and found.hits.tolist() == hits.tolist()
    assert predictions.read_hits(Path("outputs/e-vit")) is None


def test_hits_belong_to_the_same_images_only_with_their_keys_and_labels(tmp_path: Path) -> None:
    def images(keys: list[str], labels: list[int]) -> str:
        predictions.write_predictions(tmp_path, keys, labels, [0, 0], [0.1, 0.2])
        found = predictions.read_hits(tmp_path)
        assert found is not None
        return found.images

    first = images(["a", "b"], [0, 1])
    assert first == images(["a", "b"], [0, 1])
    assert len({first, images(["b", "a"], [0, 1]), images(["a", "c"], [0, 1]), images(["a", "b"], [1, 0])}) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("logged")
def test_a_gpu_gives_the_figures_of_the_cpu(place: Path) -> None:
    settings, results = experiment(ema=True, further_val={"again": "source/val"}), []
    save_outputs(
        "vit", weights=random_network(settings, "vit", seed=1), weights_ema=random_network(settings, "vit", seed=2)
    )
    for gpu in (False, True):
        train = settings.train.model_copy(update={"gpu": gpu, "loader_workers": 2 * gpu})
        results.append(evaluate.evaluate_run(settings.model_copy(update={"train": train}), "vit"))
    one_image = 100 / 15  # rounding may decide one
    assert results[1] == pytest.approx(results[0], rel=1e-2, abs=one_image + 0.1)
    assert results[1]["val/loss"] == pytest.approx(results[0]["val/loss"], rel=1e-2)


def test_averaged_weights_are_measured_beside_the_plain_ones(place: Path, logged: dict[str, float]) -> None:
    settings = experiment(ema=True)
    plain, averaged = random_network(settings, "vit", seed=1), random_network(settings, "vit", seed=2)
    save_outputs("vit", weights=plain, weights_ema=averaged)
    metrics = evaluate.evaluate_run(settings, "vit")
    expected = {}
    for prefix, model in (("val/", plain), ("val/ema_", averaged)):
        expected[prefix] = evaluate_one_by_one(model, settings, Path("source/val"), WNIDS.index)
        assert f"{prefix}top1_pct" in metrics and f"{prefix}top5_pct" in metrics
        assert_same(metrics, expected[prefix], prefix)
    assert expected["val/"]["top1_pct"] != expected["val/ema_"]["top1_pct"]
    assert logged.keys() == {"val/flop_agreement_pct", "equivariance/max_rel_error"}, "training logs the others"
    assert "val/ema_top1_pct" not in evaluate.evaluate_run(experiment(), "vit"), (
        "left from a recipe that had an average"
    )


def test_missing_weights_are_named(place: Path) -> None:
    with pytest.raises(errors.ConfigError, match=r"run `dvc repro train@vit` first"):
        evaluate.evaluate_run(experiment(), "vit")
    settings = experiment(ema=True)
    save_outputs("vit", weights=random_network(settings, "vit", seed=1))
    with pytest.raises(errors.ConfigError, match="weights_ema.safetensors not found"):
        evaluate.evaluate_run(settings, "vit")


@pytest.mark.usefixtures("logged")
def test_the_flop_changes_an_ordinary_network_and_no_equivariant_one(place: Path) -> None:
    settings, metrics = experiment(), {}
    for name in ("vit", "e-vit"):
        save_outputs(name, weights=random_network(settings, name, seed=1))
        metrics[name] = evaluate.evaluate_run(settings, name)
    assert metrics["e-vit"]["val/flop_agreement_pct"] == 100
    assert metrics["e-vit"]["equivariance/max_rel_error"] < 1e-4
    assert metrics["vit"]["val/flop_agreement_pct"] < 100
    assert metrics["vit"]["equivariance/max_rel_error"] > 1e-2


def test_an_error_that_is_not_finite_is_not_lost(place: Path) -> None:
    class Overflowing(nn.Module):
        """Gives infinite logits of the second batch, and of its flop."""

        calls = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return torch.ones(len(images), 5) * (math.inf if self.calls in (3, 4) else 1)

    settings = experiment()
    shards = manifests.Shards(settings.data.shards)
    metrics = evaluate.evaluate_model(settings, settings.recipe("vit"), shards, Overflowing()).metrics
    assert math.isnan(metrics["equivariance/max_rel_error"])


@pytest.mark.usefixtures("logged")
def test_converged_is_a_training_that_ended_above_chance(place: Path) -> None:
    settings = experiment("imagenet")
    label = imagenet.wnids().index(WNIDS[2])
    for status, class_, converged in (("finished", label, True), ("diverged", label, False), ("finished", 3, False)):
        save_outputs("vit", status, weights=constant_network(settings, class_))
        assert evaluate.evaluate_run(settings, "vit")["converged"] is converged


def test_the_equivariance_error_covers_the_symmetries_of_the_networks_group(monkeypatch: pytest.MonkeyPatch) -> None:
    args = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = randomize_parameters(build("octic_deit3_small_patch16_224", num_classes=7, **args)).eval()
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batches = [batching.Batch(images, torch.arange(3), torch.arange(3))]
    assert evaluate._predict(model, None, batches, None).max_rel_error < 1e-4
    wrong = randomize_parameters(build("flop_deit3_small_patch16_224", num_classes=7, **args)).eval()
    assert evaluate._predict(wrong, None, batches, None).max_rel_error < 1e-4
    monkeypatch.setattr(evaluate, "logit_group", lambda model: D4)
    assert evaluate._predict(wrong, None, batches, None).max_rel_error > 1e-2
