"""Weights on the validation images and further sets: accuracy, and what the flop changes.

Legend: N images, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from flopeq.testing import relative_error
from pipeline import data, further, loop, real, recipe, track, weights
from pipeline.config import ConfigError, Experiment, Recipe
from pipeline.files import write_json

BATCH_SIZE = 256
TIMES_CHANCE = 3  # below this multiple of guessing, a network has learned nothing

Metrics = dict[str, float | bool]


def evaluate(experiment: Experiment, run_name: str, outputs: Path = Path("outputs")) -> Metrics:
    """Measures a trained run, writes outputs/<run>/metrics.json, and logs the figures into its MLflow run.

    The figures are those of `measure`, of the best plain weights and, where the recipe has a moving average, of the
    best averaged ones. `converged` says whether the loss stayed finite to the last epoch and top-1 left chance level
    behind.

    Raises: ConfigError where the run was not trained; ShardError and SourceError for images that cannot be read.
    """
    folder = outputs / run_name
    if not (folder / "run.json").is_file():
        raise ConfigError(f"{folder}/run.json not found: run `dvc repro train@{run_name}` first")
    status = json.loads((folder / "run.json").read_text())["status"]
    run, recipe_, shards = experiment.run(run_name), experiment.recipe(run_name), _shards(experiment)

    def network(file: str) -> nn.Module:
        if not (folder / file).is_file():
            raise ConfigError(f"{folder / file} not found: run `dvc repro --force train@{run_name}`")
        model = recipe.model(run, recipe_, num_classes=len(shards.classes), seed=0)
        model.load_state_dict(load_file(folder / file))
        return model

    ema = None if recipe_.ema_decay is None else network("weights_ema.safetensors")
    found = measure(experiment, recipe_, shards, network("weights.safetensors"), ema)
    best = max(found["val/top1_pct"], found.get("val/ema_top1_pct", 0.0))
    metrics: Metrics = {
        **found, "converged": status == "finished" and best > TIMES_CHANCE * 100 / len(shards.classes)
    }
    write_json(folder / "metrics.json", metrics)
    by_epoch = {*track.EPOCH_METRICS, *track.AVERAGE_METRICS, "val/loss"}  # training has logged those
    logged = {name: value for name, value in found.items() if name not in by_epoch}
    track.log_final(track.run_id(run_name, outputs), logged, [folder / "metrics.json"])
    return metrics


def evaluate_weights(
    experiment: Experiment, path: Path, model_name: str, model_args: Mapping[str, Any]
) -> dict[str, float]:
    """The figures of `measure` for weights in a file, as `weights.load` reads it, on the experiment's data.

    The test crop is that of the model's runs in params.yaml, or else of all its recipes.
    Raises: WeightsError, ModelError; ConfigError where the test crop is not known; ShardError and SourceError for
    images that cannot be read.
    """
    recipe_, shards = _recipe_of(experiment, model_name), _shards(experiment)
    model = weights.load(path, model_name, model_args, num_classes=len(shards.classes),
                         image_size=experiment.data.image_size)
    return measure(experiment, recipe_, shards, model)


def measure(
    experiment: Experiment, recipe_: Recipe, shards: data.Shards, model: nn.Module, ema: nn.Module | None = None
) -> dict[str, float]:
    """Every validation image and every image of the further sets once, in float32.

    `val/flop_agreement_pct` is the share of the images that get the same top-1 class as their flop;
    `equivariance/max_rel_error` the largest relative difference between the two's logits over the batches;
    `val/ema_...` the accuracy of `ema`; `val/real_top1_pct` that on ImageNet's reassessed labels (pipeline/real.py),
    and `<name>/...` that on a further set (pipeline/further.py), both of `model`.
    """
    device = _device(experiment)
    images = data.IndexedImages(shards, "val")
    sets = {name: further.load(name, folder, shards.classes) for name, folder in experiment.data.further_val.items()}
    model, ema = model.to(device).eval(), None if ema is None else ema.to(device).eval()

    def batches(images: data.Images) -> Iterable[data.Batch]:
        return data.val_batches(images, recipe_, experiment.data, batch_size=BATCH_SIZE,
                                loader_workers=experiment.train.loader_workers, device=device)

    seen = _see(model, ema, batches(images))
    metrics = {
        **_accuracy("val/", seen.best, images.labels),
        "val/loss": seen.loss,
        "val/flop_agreement_pct": _pct(seen.best[:, 0] == seen.best_of_flop[:, 0]),
        "equivariance/max_rel_error": seen.error,
    }
    if seen.best_of_ema is not None:
        metrics |= _accuracy("val/ema_", seen.best_of_ema, images.labels)
    if labels := real.labels(shards.classes, images.keys(range(len(images)))):
        metrics["val/real_top1_pct"] = real.top1_pct(seen.best[:, 0].tolist(), labels)
    for name, further_images in sets.items():
        found = loop.evaluate(model, batches(further_images))
        metrics |= {f"{name}/top1_pct": found.top1_pct, f"{name}/top5_pct": found.top5_pct}
    return metrics


class _Seen(NamedTuple):
    """What networks make of labelled images, in their order."""

    best: Tensor
    """(N, min(5, K)) int64, the likeliest classes."""
    best_of_flop: Tensor
    """The same of the images' flops."""
    best_of_ema: Tensor | None
    """The same by the averaged weights."""
    loss: float
    """Mean cross-entropy."""
    error: float
    """Largest relative difference between the logits of images and of their flops; nan if any is not finite."""


@torch.inference_mode()
def _see(model: nn.Module, ema: nn.Module | None, batches: Iterable[data.Batch]) -> _Seen:
    best, of_flop, of_ema, losses, errors = [], [], [], [], []
    for batch in batches:
        logits, flopped = model(batch.images), model(batch.images.flip(-1))
        best.append(_best(logits))
        of_flop.append(_best(flopped))
        if ema is not None:
            of_ema.append(_best(ema(batch.images)))
        losses.append(F.cross_entropy(logits.double(), batch.labels, reduction="none").cpu())
        errors.append(relative_error(flopped, logits))
    return _Seen(torch.cat(best), torch.cat(of_flop), torch.cat(of_ema) if of_ema else None,
                 torch.cat(losses).mean().item(), torch.tensor(errors).max().item())


def _best(logits: Tensor) -> Tensor:
    return logits.topk(min(5, logits.shape[1])).indices.cpu()


def _accuracy(prefix: str, best: Tensor, labels: Tensor) -> dict[str, float]:
    hits = best == labels[:, None]
    return {f"{prefix}top1_pct": _pct(hits[:, 0]), f"{prefix}top5_pct": _pct(hits.any(1))}


def _pct(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()


def _shards(experiment: Experiment) -> data.Shards:
    return data.Shards(experiment.data.shards, cache_gib=experiment.data.cache_gib)


def _device(experiment: Experiment) -> torch.device:
    gpu = experiment.train.gpu is not False and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


def _recipe_of(experiment: Experiment, model_name: str) -> Recipe:
    """A recipe with the test crop that is meant for a model."""
    runs = [experiment.recipe(name) for name, run in experiment.models.items() if run.model == model_name]
    by_crop = {recipe_.test_crop_ratio: recipe_ for recipe_ in runs or experiment.recipes.values()}
    if len(by_crop) != 1:
        crops = " and ".join(map(str, sorted(by_crop)))
        raise ConfigError(
            f"params.yaml has recipes with test_crop_ratio {crops}, and which one is meant for {model_name} is not "
            "known: give it one run, under models"
        )
    return next(iter(by_crop.values()))
