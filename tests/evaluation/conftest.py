"""Two small ViTs with random weights, and fifteen validation images of five of ImageNet's classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms.v2.functional import pil_to_tensor

from pipeline import track
from pipeline.base import config
from pipeline.base.yaml_files import dump_yaml
from pipeline.evaluation import evaluate
from pipeline.loading import augment, batching, datasets
from pipeline.packing import pack
from pipeline.packing.sources import detect
from pipeline.shards import manifests
from pipeline.training import recipe
from tests.conftest import params_with_runs
from tests.models.conftest import randomize_parameters
from tests.packing import layouts

ROOT = Path(__file__).resolve().parents[2]


WNIDS = ("n01440764", "n01443537", "n02102040", "n03417042", "n07753592")


SIDE = 48


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifteen validation images of five of ImageNet's classes, sharded with labels of their own and with ImageNet's."""
    folder = tmp_path_factory.mktemp("evaluate")
    layouts.folder_tree(layouts.images(train=2, val=3, wnids=WNIDS), folder / "source")
    source = detect.detect_source(str(folder / "source"))
    assert not isinstance(source, detect.ExistingShards)
    for labels in ("own", "imagenet"):
        pack.pack_listing(
            source.list_images(labels),
            source.root,
            folder / "data/shards" / labels,
            source="source",
            images_per_shard=4,
            seed=0,
            labels=labels,
        )
    return folder


@pytest.fixture
def place(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with those shards and an empty `outputs`."""
    (tmp_path / "data").symlink_to(base / "data")
    (tmp_path / "source").symlink_to(base / "source")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 4)  # the last of four batches is not full
    return tmp_path


def experiment(
    labels: str = "own", *, ema: bool = False, loader_workers: int = 0, **data_changes: Any
) -> config.Experiment:
    """Two small ViTs on those shards, from a params.yaml that is written here."""
    params = params_with_runs("vit", "e-vit")
    params["data"] |= {"name": labels, "source": "source", "labels": labels, "image_size": SIDE, **data_changes}
    params["train"]["loader_workers"] = loader_workers
    for run in params["models"].values():
        run["args"] = {**run["args"], "img_size": SIDE}
    params["recipes"]["digits"] |= {
        "test_crop_ratio": 0.875,
        "ema_decay": 0.9 if ema else None,
        "drop_path": 0.5,  # which evaluation must not do
    }
    Path("params.yaml").write_text(dump_yaml(params))
    return config.load_experiment()


@torch.no_grad()
def random_network(experiment: config.Experiment, run_name: str, seed: int) -> nn.Module:
    """Random weights, of which a bias keeps any class from being the validation images' only one."""
    run, shards = experiment.run(run_name), manifests.Shards(experiment.data.shards)
    recipe_ = experiment.recipe(run_name)
    model = randomize_parameters(recipe.build_model(run, recipe_, num_classes=len(shards.classes), seed=0)).eval()
    head: Any = model.head
    head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)))
    [batch] = batching.val_batches(datasets.IndexedImages(shards, "val"), recipe_, experiment.data, batch_size=100)
    head.bias -= model(batch.images).mean(0)
    return model


@torch.no_grad()
def constant_network(experiment: config.Experiment, class_: int) -> nn.Module:
    """A ViT for which everything is of one class, and otherwise the likelier the smaller the label."""
    model = random_network(experiment, "vit", seed=0)
    head: Any = model.head
    head.weight.zero_()
    head.bias.copy_(torch.linspace(0, -1, len(head.bias)))
    head.bias[class_] = 1
    return model


def save_outputs(run_name: str, status: str = "finished", **models: nn.Module) -> None:
    """Leaves what a training leaves, with weights by file name."""
    folder = Path("outputs", run_name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"status": status, "mlflow_run_id": "0" * 32}))
    for name, model in models.items():
        save_file(model.state_dict(), folder / f"{name}.safetensors")


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What goes to MLflow."""
    metrics: dict[str, float] = {}
    monkeypatch.setattr(track, "log_results", lambda run_id, new_metrics, artifacts: metrics.update(new_metrics))
    return metrics


@torch.no_grad()
def evaluate_one_by_one(
    model: nn.Module, settings: config.Experiment, folder: Path, label_of: Callable[[str], int]
) -> dict[str, float]:
    """The accuracies on a folder `<class>/*`, by PIL and one image at a time."""
    transform = augment.build_eval_transform(settings.recipe("vit"), settings.data)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.data.mean, settings.data.std))
    ranks, losses = [], []
    paths = [path for path in sorted(folder.glob("*/*")) if path.suffix != ".txt"]
    for path in paths:
        pixels = transform(pil_to_tensor(Image.open(path).convert("RGB")))
        logits = model(((pixels / 255 - mean) / std)[None])[0]
        label = label_of(path.parent.name)
        ranks.append(int((logits > logits[label]).sum()))
        losses.append(float(logits.double().logsumexp(0) - logits[label]))
    share = {f"top{k}_pct": 100 * sum(rank < k for rank in ranks) / len(ranks) for k in (1, 5)}
    assert len(paths) > 0 and 0 < share["top1_pct"] < 100, "the comparison is to show something"
    return share | {"loss": sum(losses) / len(losses)}


def assert_same(metrics: dict[str, Any], expected: dict[str, float], prefix: str) -> None:
    for name, value in expected.items():
        if prefix + name in metrics:
            assert metrics[prefix + name] == pytest.approx(value, rel=1e-4), name
