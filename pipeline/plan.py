"""Estimates steps, FLOPs, GPU-hours, memory and disk of every run of an experiment, without starting anything."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import flopeq
from flopeq.measure.flops import complexity
from flopeq.models.build import build
from pipeline.base.config import Experiment
from pipeline.base.errors import ConfigError
from pipeline.base.schema import Recipe

IMAGENET = 1_281_167
"""Training images of ImageNet-1K."""

TRAIN_STEP_COST = 3
"""Cost of a training step in forward passes: a forward pass, and a backward pass at twice its cost."""

LOADER_IMG_PER_S, LOADER_IMG_PER_S_WITH_POLICY = 700, 380
"""Images per second of one loader process on one core, as docs/data.md has them: JPEGs of 112 KB, a random crop to 224
pixels and a flop, without and with an augmentation policy. Smaller images are faster."""

_FLOAT_BYTES = 4

_GIB = 2**30


@dataclass(frozen=True)
class RunEstimate:
    """The estimate of one run."""

    run: str
    model: str
    epochs: int
    steps: int
    """Total number of optimizer steps."""
    images_per_worker: int
    """Images per worker in a global batch."""
    params_m: float
    """Parameters, in millions."""
    gflops: float
    """FLOPs of one image's forward pass, in 10^9."""
    gpu_hours: float | None
    """Sum over all GPUs; None if the throughput is unknown."""
    state_gib: float
    """Memory of weights, gradients, optimizer and moving average on each GPU, without activations."""
    loaders: int | None
    """Loader processes per worker that deliver images as fast as its GPU trains on them, each on a core of its own;
    None if the throughput is unknown."""
    disk_gib: float
    """Kept checkpoints and the final weights."""


def estimate_runs(experiment: Experiment, *, img_per_s: float | None = None) -> Iterator[RunEstimate]:
    """Yields the estimate of every run. Counting the FLOPs of a large model takes seconds.

    Args:
        img_per_s: training throughput of one GPU; None: a third of the model's forward throughput on an A100 in the
            paper's Table 1, which counts arithmetic only.
    Raises: ConfigError if the number of training images is not known.
    """
    num_images, num_classes = dataset_size(experiment)
    size = (3, experiment.data.image_size, experiment.data.image_size)
    paper_throughput = {(row.model, row.params_m): row.throughput_a100_im_s for row in flopeq.table1()}
    for name, run in experiment.models.items():
        tuned = experiment.sweeps.tuned.get(run.recipe)  # costs as much as its base
        recipe = experiment.recipes[tuned.base] if tuned else experiment.recipe(name)
        counts = complexity(build(run.model, device="meta", num_classes=num_classes, **run.args), size)
        steps = recipe.epochs * (num_images // recipe.global_batch_size)
        paper = paper_throughput.get((run.model, round(counts.params / 1e6, 1)), 0)  # arguments may change the size
        train_img_per_s = img_per_s or paper / TRAIN_STEP_COST
        has_ema = recipe.ema_decay is not None
        weights_gib = counts.params * _FLOAT_BYTES / _GIB
        num_checkpoints = experiment.train.keep_checkpoints + 1  # and the best weights
        yield RunEstimate(
            run=name,
            model=run.model,
            epochs=recipe.epochs,
            steps=steps,
            images_per_worker=recipe.global_batch_size // experiment.train.most_workers,
            params_m=counts.params / 1e6,
            gflops=counts.flops / 1e9,
            gpu_hours=steps * recipe.global_batch_size / train_img_per_s / 3600 if train_img_per_s else None,
            loaders=math.ceil(train_img_per_s / _loader_img_per_s(recipe)) if train_img_per_s else None,
            state_gib=weights_gib * (4 + has_ema),  # weight, gradient, two moments
            disk_gib=weights_gib
            * (num_checkpoints * (4 + has_ema) + 1),  # a checkpoint: model, two moments, best weights
        )


def _loader_img_per_s(recipe: Recipe) -> float:
    return LOADER_IMG_PER_S_WITH_POLICY if recipe.auto_augment or recipe.color_jitter else LOADER_IMG_PER_S


def dataset_size(experiment: Experiment) -> tuple[int, int]:
    """Returns the numbers of training images and classes, from the shards if they exist, or else of ImageNet.

    Raises: ConfigError if neither is known.
    """
    manifest = experiment.data.shards / "manifest.json"
    if manifest.is_file():
        content = json.loads(manifest.read_text())
        return content["counts"]["train"], len(content["classes"])
    if experiment.data.labels == "imagenet":
        return IMAGENET, 1000
    raise ConfigError(f"{manifest} not found, so the number of images is unknown: run `dvc repro shard` first")
