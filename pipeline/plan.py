"""What an experiment would take: steps, FLOPs, GPU-hours, memory and disk of every run, with nothing started."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import flopeq
from flopeq.build import build
from flopeq.flops import complexity
from pipeline.config import ConfigError, Experiment

IMAGENET = 1_281_167
"""Training images of ImageNet-1K."""
STEP_OVER_FORWARD = 3
"""A training step computes a forward pass and, at twice its cost, a backward pass."""
_FLOAT_BYTES = 4
_GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """One run, before it starts."""

    run: str
    model: str
    epochs: int
    steps: int
    """Optimizer steps in all."""
    images_per_worker: int
    """Share of each worker in a global batch."""
    params_m: float
    """Parameters, in millions."""
    gflops: float
    """FLOPs of one image's forward pass, in 10^9."""
    gpu_hours: float | None
    """Of one GPU, or of all together; None where no throughput is known."""
    state_gib: float
    """Memory of weights, gradients, optimizer and average on each GPU; activations come on top."""
    disk_gib: float
    """Checkpoints that are kept, and the final weights."""


def plan(experiment: Experiment, *, img_per_s: float | None = None) -> Iterator[Plan]:
    """The plan of every run, in turn: the large models take seconds to count.

    Args:
        img_per_s: training throughput of one GPU; None: a third of the forward throughput on an A100 that the paper's
            Table 1 gives for the run's model, which leaves out all but arithmetic.
    Raises: ConfigError where the number of training images is not known.
    """
    num_images, num_classes = _data(experiment)
    size = (3, experiment.data.image_size, experiment.data.image_size)
    forward = {(row.model, row.params_m): row.throughput_a100_im_s for row in flopeq.table1()}
    for name, run in experiment.models.items():
        tuned = experiment.sweeps.tuned.get(run.recipe)  # costs what its base costs
        recipe = experiment.recipes[tuned.base] if tuned else experiment.recipe(name)
        counted = complexity(build(run.model, device="meta", num_classes=num_classes, **run.args), size)
        steps = recipe.epochs * (num_images // recipe.global_batch_size)
        paper = forward.get((run.model, round(counted.params / 1e6, 1)), 0)  # arguments may have made another size
        rate = img_per_s or paper / STEP_OVER_FORWARD
        averages = recipe.ema_decay is not None
        weights_gib = counted.params * _FLOAT_BYTES / _GIB
        kept = experiment.train.keep_checkpoints + 1  # and the best
        yield Plan(
            run=name,
            model=run.model,
            epochs=recipe.epochs,
            steps=steps,
            images_per_worker=recipe.global_batch_size // experiment.train.most_workers,
            params_m=counted.params / 1e6,
            gflops=counted.flops / 1e9,
            gpu_hours=steps * recipe.global_batch_size / rate / 3600 if rate else None,
            state_gib=weights_gib * (4 + averages),  # weight, gradient, two moments
            disk_gib=weights_gib * (kept * (4 + averages) + 1),  # a checkpoint: model, two moments, best weights
        )


def _data(experiment: Experiment) -> tuple[int, int]:
    """Training images and classes: of the shards where they are written, of ImageNet where its labels are asked for."""
    manifest = experiment.data.shards / "manifest.json"
    if manifest.is_file():
        content = json.loads(manifest.read_text())
        return content["counts"]["train"], len(content["classes"])
    if experiment.data.labels == "imagenet":
        return IMAGENET, 1000
    raise ConfigError(f"{manifest} not found, so the number of images is not known: run `dvc repro shard` first")
