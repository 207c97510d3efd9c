"""Symmetrized runs are evaluated with the weights of their run, and fail with a message where they cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from pipeline import track
from pipeline.base import config
from pipeline.base.errors import ConfigError
from pipeline.base.yaml_files import dump_yaml, read_yaml
from pipeline.evaluation import evaluate, symmetrized
from pipeline.evaluation.networks import build_network
from pipeline.loading import batching, datasets
from pipeline.shards import manifests
from tests.evaluation.conftest import experiment, random_network, save_outputs


def with_symmetrized(**runs: dict[str, Any]) -> config.Experiment:
    """The experiment of the tests with these symmetrized runs."""
    experiment()
    params = read_yaml(Path("params.yaml")) | {"symmetrized": runs}
    Path("params.yaml").write_text(dump_yaml(params))
    return config.load_experiment()


SYM: dict[str, dict[str, Any]] = {"vit-sym": {"weights_of": "vit", "group": "flop"}}


@pytest.fixture
def tracked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What goes to MLflow."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(track, "start_run", lambda _, name: found.setdefault("run", name) and "1" * 32)
    monkeypatch.setattr(track, "log_results", lambda _, metrics, files: found.update(metrics=metrics, files=files))
    monkeypatch.setattr(track, "end_run", lambda _, status: found.update(status=status))
    return found


def test_its_logits_are_the_mean_over_image_and_flop(place: Path, tracked: dict[str, Any]) -> None:
    settings = with_symmetrized(**SYM)
    model = random_network(settings, "vit", seed=1)
    save_outputs("vit", weights=model)
    metrics = symmetrized.evaluate_symmetrized_run(settings, "vit-sym")
    shards = manifests.Shards(settings.data.shards)
    batches = batching.val_batches(
        datasets.IndexedImages(shards, "val"), settings.recipe("vit"), settings.data, batch_size=100
    )
    [batch] = batches
    with torch.inference_mode():
        logits = (model(batch.images) + model(batch.images.flip(-1))) / 2
    kept = pq.read_table("outputs/vit-sym/predictions.parquet")
    assert kept["top1"].to_pylist() == logits.argmax(1).tolist()
    assert metrics["val/flop_agreement_pct"] == 100 and metrics["equivariance/max_rel_error"] < 1e-5
    folder = Path("outputs/vit-sym")
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert json.loads((folder / "run.json").read_text()) == {
        "run": "vit-sym", "mlflow_run_id": "1" * 32, "status": "finished"
    }  # fmt: skip
    written = read_yaml(folder / "config.yaml")
    assert written["symmetrize"] == {"weights_of": "vit", "group": "flop", "how": "average"}
    assert (written["run"], written["seed"], written["recipe"]["name"]) == ("vit-sym", 0, "digits")
    assert (tracked["run"], tracked["status"]) == ("vit-sym", "finished")
    assert tracked["metrics"]["val/top1_pct"] == metrics["val/top1_pct"]
    assert not (folder / "weights.safetensors").exists()


@pytest.mark.usefixtures("place", "tracked")
def test_what_cannot_be_evaluated_is_refused() -> None:
    settings = with_symmetrized(**SYM)
    with pytest.raises(ConfigError, match="run `dvc repro train@vit` first"):
        symmetrized.evaluate_symmetrized_run(settings, "vit-sym")
    with pytest.raises(ConfigError, match="vit is a trained run, not one of `symmetrized`"):
        symmetrized.evaluate_symmetrized_run(settings, "vit")
    with pytest.raises(ConfigError, match="vit-sym is not trained.*`dvc repro symmetrize@vit-sym`"):
        evaluate.evaluate_run(settings, "vit-sym")


@pytest.mark.usefixtures("place")
def test_every_run_has_its_network() -> None:
    settings = with_symmetrized(**SYM, turned={"weights_of": "e-vit", "group": "c4", "how": "choose"})
    networks = {name: build_network(settings, name, num_classes=5) for name in settings.run_names}
    images = torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        logits = {name: network.eval()(images) for name, network in networks.items()}
        turned = networks["turned"](torch.rot90(images, 1, (-2, -1)))
    assert list(logits) == ["vit", "e-vit", "vit-sym", "turned"]
    assert all(found.shape == (2, 5) for found in logits.values())
    torch.testing.assert_close(turned, logits["turned"])
