"""Evaluates weights on the validation images and further sets: accuracy, and the effect of the flop.

Legend: N images, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flopeq.square import FLOP, IDENTITY, Symmetry
from flopeq.testing import logit_group, relative_error
from pipeline import track
from pipeline.base.config import Experiment
from pipeline.base.errors import ConfigError
from pipeline.base.files import write_json
from pipeline.base.schema import Recipe
from pipeline.evaluation import predictions, statistics, validation_sets, weights
from pipeline.evaluation.networks import load_trained_network, select_device
from pipeline.loading import batching, datasets
from pipeline.shards import manifests
from pipeline.training import device_settings, loop

BATCH_SIZE = 256

MIN_TIMES_CHANCE = 3  # below this multiple of chance level, a model has learned nothing

TOP1_BOUNDS = ("val/top1_low_pct", "val/top1_high_pct")
"""Metrics that bound `val/top1_pct`."""

Metrics = dict[str, float | bool]


def call_here(function: Callable[..., Metrics], *arguments: Any) -> Metrics:
    """Calls a function in this process. A stage passes one that calls it where the GPUs are."""
    return function(*arguments)


def evaluate_run(
    experiment: Experiment, run_name: str, outputs: Path = Path("outputs"), call: Callable[..., Metrics] = call_here
) -> Metrics:
    """Evaluates a trained run, writes its metrics.json and predictions.parquet, and logs the metrics to its MLflow run.

    The metrics are those of `evaluate_model`, for the best plain weights and, if the recipe has a moving average, for
    the best averaged weights. `converged` says whether the loss stayed finite to the last epoch and top-1 is well above
    chance level.

    Args:
        call: calls a function with arguments where it computes fastest.
    Raises: ConfigError if the run was not trained; ShardError and SourceError for unreadable images.
    """
    experiment.check_is_trained(run_name)
    metrics = call(evaluate_trained_weights, experiment, run_name, outputs / run_name, outputs)
    # Training logs the others at every epoch; the bounds belong to the kept weights, as best/top1_pct of the report.
    not_logged = {*track.EPOCH_METRICS, *track.EMA_METRICS, "val/loss", *TOP1_BOUNDS}
    new_metrics = {name: value for name, value in metrics.items() if name not in {*not_logged, "converged"}}
    track.log_results(track.find_run_id(run_name, outputs), new_metrics, [outputs / run_name / "metrics.json"])
    return metrics


def evaluate_trained_weights(
    experiment: Experiment,
    run_name: str,
    folder: Path,
    outputs: Path = Path("outputs"),
    transform: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Metrics:
    """Evaluates the weights of a trained run, and writes metrics.json and predictions.parquet into `folder`.

    Args:
        transform: makes the network to evaluate from the trained one.
    Raises: ConfigError if the run was not trained; ShardError and SourceError for unreadable images.
    """
    info = outputs / run_name / "run.json"
    if not info.is_file():
        raise ConfigError(f"{info} not found: run `dvc repro train@{run_name}` first")
    recipe_, shards = experiment.recipe(run_name), _open_shards(experiment)
    device_settings.apply_backend_settings(experiment.train)

    def load(file: str) -> nn.Module:
        num_classes = len(shards.classes)
        return transform(load_trained_network(experiment, run_name, file, num_classes=num_classes, outputs=outputs))

    ema = None if recipe_.ema_decay is None else load("weights_ema.safetensors")
    measured, predicted, images = evaluate_model(experiment, recipe_, shards, load("weights.safetensors"), ema)
    best = max(measured["val/top1_pct"], measured.get("val/ema_top1_pct", 0.0))
    has_finished = json.loads(info.read_text())["status"] == "finished"
    metrics: Metrics = {
        **measured,
        "converged": has_finished and best > MIN_TIMES_CHANCE * 100 / len(shards.classes),
    }
    predictions.write_predictions(
        folder,
        images.keys(range(len(images))),
        images.labels.tolist(),
        predicted.top5[:, 0].tolist(),
        predicted.losses.tolist(),
    )
    write_json(folder / "metrics.json", metrics)
    return metrics


def evaluate_weights(
    experiment: Experiment, path: Path, model_name: str, model_args: Mapping[str, Any]
) -> dict[str, float]:
    """Evaluates the weights in a file, read by `weights.load_weights`, on the experiment's data.

    The test crop is that of the model's runs in params.yaml, or else of all its recipes.
    Raises: WeightsError, ModelError; ConfigError if the test crop is ambiguous; ShardError and SourceError for
    unreadable images.
    """
    recipe_, shards = _recipe_for_model(experiment, model_name), _open_shards(experiment)
    device_settings.apply_backend_settings(experiment.train)
    model = weights.load_weights(
        path, model_name, model_args, num_classes=len(shards.classes), image_size=experiment.data.image_size
    )
    return evaluate_model(experiment, recipe_, shards, model).metrics


def evaluate_model(
    experiment: Experiment, recipe_: Recipe, shards: manifests.Shards, model: nn.Module, ema: nn.Module | None = None
) -> Evaluated:
    """Evaluates models once on every validation image and every image of the further sets, in training's precision.

    `val/top1_low_pct` and `val/top1_high_pct` are Wilson's 95 % interval of `val/top1_pct`;
    `val/flop_agreement_pct` is the share of images with the same top-1 class as their flop;
    `equivariance/max_rel_error` is the largest relative difference between the logits of both, in float32, over the
    batches, or over the first one if training's precision is lower, and over the other symmetries that the logits are
    invariant under, on the first batch;
    `val/ema_...` is the accuracy of `ema`. `val/real_top1_pct` is the accuracy of `model` on ImageNet's reassessed
    labels, `<name>/...` its accuracy on a further set (pipeline/evaluation/validation_sets.py).
    """
    device, amp = select_device(experiment), experiment.train.amp if recipe_.mixed_precision else None
    images = datasets.IndexedImages(shards, "val")
    further_sets = {
        name: validation_sets.load_further_set(name, folder, shards.classes)
        for name, folder in experiment.data.further_val.items()
    }
    model, ema = model.to(device).eval(), None if ema is None else ema.to(device).eval()

    def batches(images: datasets.ImageDataset) -> Iterable[batching.Batch]:
        return batching.val_batches(
            images,
            recipe_,
            experiment.data,
            batch_size=BATCH_SIZE,
            loader_workers=experiment.train.loader_workers,
            device=device,
        )

    predicted = _predict(model, ema, batches(images), amp)
    metrics = {
        **_accuracy_metrics("val/", predicted.top5, images.labels),
        **_top1_bounds(predicted.top5[:, 0] == images.labels),
        "val/loss": predicted.losses.mean().item(),
        "val/flop_agreement_pct": _percent(predicted.top5[:, 0] == predicted.flop_top5[:, 0]),
        "equivariance/max_rel_error": predicted.max_rel_error,
    }
    if predicted.ema_top5 is not None:
        metrics |= _accuracy_metrics("val/ema_", predicted.ema_top5, images.labels)
    if labels := validation_sets.real_labels(shards.classes, images.keys(range(len(images)))):
        metrics["val/real_top1_pct"] = validation_sets.real_top1_pct(predicted.top5[:, 0].tolist(), labels)
    for name, further_images in further_sets.items():
        further = loop.evaluate(model, batches(further_images), amp=amp)
        metrics |= {f"{name}/top1_pct": further.top1_pct, f"{name}/top5_pct": further.top5_pct}
    return Evaluated(metrics, predicted, images)


class Predictions(NamedTuple):
    """Predictions for labelled images, in their order."""

    top5: Tensor
    """(N, min(5, K)) int64, the most likely classes."""
    flop_top5: Tensor
    """The same for the images' flops."""
    ema_top5: Tensor | None
    """The same for the averaged weights."""
    losses: Tensor
    """(N,) float64, the cross-entropy of each image."""
    max_rel_error: float
    """Largest relative difference between the logits of images and of their flops, and on the first batch of their
    copies under the other symmetries of the logits' group; nan if any is not finite."""


class Evaluated(NamedTuple):
    """What was measured of a model."""

    metrics: dict[str, float]
    predictions: Predictions
    """For the validation images, in the index's order."""
    images: datasets.IndexedImages
    """The validation images."""


@torch.inference_mode()
def _predict(
    model: nn.Module, ema: nn.Module | None, batches: Iterable[batching.Batch], amp: str | None
) -> Predictions:
    """Waits for a GPU only after the first batch and at the end."""
    top5, flop_top5, ema_top5, losses, errors = [], [], [], [], []
    others = [g for g in logit_group(model).elements if g not in (IDENTITY, FLOP)]
    for batch in batches:
        device = batch.images.device
        with loop.autocast(device, amp):
            logits, flopped = model(batch.images), model(batch.images.flip(-1))
            if ema is not None:
                ema_top5.append(_top_classes(ema(batch.images)))
        top5.append(_top_classes(logits))
        flop_top5.append(_top_classes(flopped))
        losses.append(F.cross_entropy(logits.double(), batch.labels, reduction="none"))
        is_exact = amp is None and device.type == "cpu"
        if not errors:
            errors += _exact_errors(model, batch.images, others if is_exact else [FLOP, *others])
        if is_exact:
            errors.append(relative_error(flopped, logits))
    return Predictions(
        torch.cat(top5).cpu(),
        torch.cat(flop_top5).cpu(),
        torch.cat(ema_top5).cpu() if ema_top5 else None,
        torch.cat(losses).cpu(),
        torch.tensor(errors).max().item(),
    )


def _exact_errors(model: nn.Module, images: Tensor, symmetries: Sequence[Symmetry]) -> list[float]:
    """Returns, for each symmetry, by how much it changes the logits, relative, in float32 without TF32."""
    if not symmetries:
        return []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        logits = model(images)
        return [relative_error(model(symmetry(images)), logits) for symmetry in symmetries]
    finally:
        torch.set_float32_matmul_precision(before)


def _top_classes(logits: Tensor) -> Tensor:
    return logits.topk(min(5, logits.shape[1])).indices


def _accuracy_metrics(prefix: str, top5: Tensor, labels: Tensor) -> dict[str, float]:
    hits = top5 == labels[:, None]
    return {f"{prefix}top1_pct": _percent(hits[:, 0]), f"{prefix}top5_pct": _percent(hits.any(1))}


def _top1_bounds(hits: Tensor) -> dict[str, float]:
    interval = statistics.wilson_interval(int(hits.sum()), len(hits)).scaled(100)
    return dict(zip(TOP1_BOUNDS, interval, strict=True))


def _percent(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()


def _open_shards(experiment: Experiment) -> manifests.Shards:
    return manifests.Shards(experiment.data.shards, cache_gib=experiment.data.cache_gib)


def _recipe_for_model(experiment: Experiment, model_name: str) -> Recipe:
    """Returns a recipe with the model's test crop."""
    runs = [experiment.recipe(name) for name, run in experiment.models.items() if run.model == model_name]
    by_crop = {recipe_.test_crop_ratio: recipe_ for recipe_ in runs or experiment.recipes.values()}
    if len(by_crop) != 1:
        crops = " and ".join(map(str, sorted(by_crop)))
        raise ConfigError(
            f"params.yaml has recipes with test_crop_ratio {crops}, and the one for {model_name} is "
            "ambiguous: give it one run, under models"
        )
    return next(iter(by_crop.values()))
