"""What the scaling study takes, without starting it: on A100s, and on this machine's CPUs by a few timed steps."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import flopeq
from flopeq.registry import describe
from pipeline.base.config import Experiment
from pipeline.loading import batching, datasets
from pipeline.plan import dataset_size
from pipeline.scaling import grid
from pipeline.scaling.grid import Plan, Training
from pipeline.shards import manifests
from pipeline.training import recipe as recipes

_TIMED_IMAGES, _TIMED_STEPS = 64, 3

_MAX_TIMED_FLOPS = 1e10  # of one step; with more, the study is none for CPUs


@dataclass(frozen=True)
class StudyEstimate:
    """The estimate of a study."""

    plan: Plan
    a100_hours: float
    """At the FLOPs per second of the paper's forward passes (Table 1), of the size that is closest: arithmetic only."""
    hours: float | None
    """On the cores of this machine, all of them idle; None if the networks are too large to time them, or without
    shards."""


def estimate_study(experiment: Experiment) -> StudyEstimate:
    """Counts the FLOPs of a study and, if its networks are small, times a few steps of each on one core.

    Raises: ConfigError for a study that cannot be trained, or if the number of training images is not known.
    """
    num_images, num_classes = dataset_size(experiment)
    plan = grid.plan_study(experiment, grid.count_costs(experiment, num_classes), num_images)
    a100_s = sum(
        training.compute / a100_flops_per_s(_model(experiment, training), training) for training in plan.trainings
    )
    return StudyEstimate(plan, a100_s / 3600, _hours_on_cpus(experiment, plan.trainings, num_classes))


def a100_flops_per_s(model: str, training: Training) -> float:
    """Returns the FLOPs per second of the row of Table 1 with the same variant (E for larger groups) and family, or
    else of a ViT, whose FLOPs per image are closest."""
    info = describe(model)
    family, variant = (info.family, info.variant) if info else ("vit", "X")
    rows = [row for row in flopeq.table1() if row.family == family]
    rows = [row for row in rows if row.variant == (variant if variant in "XH" else "E")] or rows
    row = min(rows, key=lambda row: abs(math.log(row.gflops_per_img * 1e9 / training.flops_image)))
    return row.throughput_a100_im_s * row.gflops_per_img * 1e9


def _hours_on_cpus(experiment: Experiment, trainings: Iterable[Training], num_classes: int) -> float | None:
    if not (experiment.data.shards / "manifest.json").is_file():
        return None
    if any(grid.TRAIN_STEP_COST * training.flops_image * _TIMED_IMAGES > _MAX_TIMED_FLOPS for training in trainings):
        return None
    shards, settings = manifests.Shards(experiment.data.shards), grid.scaling_of(experiment)
    num_val = len(datasets.IndexedImages(shards, "val"))
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.cpus_per_worker)
    loading_s = _time_loading(experiment, shards)
    step_s: dict[tuple[str, str], float] = {}
    total_s = 0.0
    for training in trainings:
        key = (training.arm, training.size)
        if key not in step_s:
            step_s[key] = _time_step(experiment, *key, num_classes=num_classes)
        total_s += training.images_seen * (loading_s + step_s[key])
        total_s += 2 * num_val * (loading_s + step_s[key] / grid.TRAIN_STEP_COST)  # its validation, twice
    torch.set_num_threads(threads)
    trials_at_once = max(1, (os.cpu_count() or 1) // settings.cpus(experiment.train))
    return total_s / trials_at_once / 3600


def _time_loading(experiment: Experiment, shards: manifests.Shards) -> float:
    """Returns the CPU seconds of reading, decoding and augmenting an image."""
    images = datasets.IndexedImages(shards, "train")
    recipe = experiment.recipes[grid.scaling_of(experiment).recipe]
    batches = batching.train_batches(images, recipe, experiment.data, seed=0, epoch=0)
    next(batches)
    started = time.process_time()
    batch = next(batches)
    return (time.process_time() - started) / len(batch.labels)


def _time_step(experiment: Experiment, arm: str, size: str, *, num_classes: int) -> float:
    """Returns the CPU seconds of a training step for each image, the fastest of a few steps."""
    run, recipe = grid.make_run(experiment, arm, size), grid.make_recipe(experiment, arm)
    model = recipes.build_model(run, recipe, num_classes=num_classes, seed=0)
    optimizer = recipes.build_optimizer(recipe, model)
    images = torch.randn(_TIMED_IMAGES, 3, experiment.data.image_size, experiment.data.image_size)
    labels = torch.zeros(_TIMED_IMAGES, dtype=torch.int64)
    times = []
    for _ in range(_TIMED_STEPS):
        started = time.process_time()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        times.append(time.process_time() - started)
    return min(times) / _TIMED_IMAGES


def _model(experiment: Experiment, training: Training) -> str:
    return grid.scaling_of(experiment).arms[training.arm].model
