"""A sweep: its settings, its data, and the trials made from them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flopeq
from flopeq.measure.flops import complexity
from flopeq.models.build import build
from flopeq.models.variants import baseline_name
from pipeline.base.config import Experiment
from pipeline.base.schema import HybridSweepParams, Recipe, RecipeSweepParams, Run
from pipeline.loading import batching, datasets
from pipeline.plan import TRAIN_STEP_COST
from pipeline.shards import manifests
from pipeline.sweeps.trial import TrialSpec
from pipeline.training import fingerprint
from pipeline.training import recipe as recipes

logger = logging.getLogger(__name__)


class Sweep:
    """A running sweep of the experiment. It makes the trials and owns their directory."""

    def __init__(self, experiment: Experiment, name: str, settings: RecipeSweepParams | HybridSweepParams) -> None:
        self.experiment, self.name, self.settings = experiment, name, settings
        self.title = f"sweep_{name}"
        self.shards = manifests.Shards(experiment.data.shards, cache_gib=experiment.data.cache_gib)
        self.classes = settings.proxy and settings.proxy.classes
        self.images, self.num_classes = datasets.load_splits(self.shards, self.classes)
        self.trials_dir = Path("sweeps/trials", name).absolute()
        self.trials_dir.mkdir(parents=True, exist_ok=True)

    def make_trial(
        self,
        run_name: str,
        index: int,
        round: int,
        seed: int,
        params: Mapping[str, Any],
        run: Run,
        recipe: Recipe,
        *,
        is_confirmation: bool = False,
    ) -> TrialSpec:
        """Makes a trial of a run and its recipe, with the sweep's proxy data and number of epochs.

        Args:
            is_confirmation: whether to train for all epochs of the recipe, without early stopping.
        """
        experiment, settings = self.experiment, self.settings
        side = settings.proxy and settings.proxy.image_size
        if side:
            run = run.model_copy(update={"args": {**run.args, "img_size": side}})
            experiment = experiment.model_copy(update={"data": experiment.data.model_copy(update={"image_size": side})})
        recipe = recipe if is_confirmation else shorten_recipe(recipe, settings.epochs)
        recipes.check_recipe(recipe, experiment.data, experiment.train.model_copy(update={"workers": settings.workers}))
        experiment = experiment.model_copy(
            update={
                "models": {run_name: run.model_copy(update={"recipe": "trial", "seed": seed})},
                "recipes": {"trial": recipe},
                "train": experiment.train.model_copy(
                    update={
                        "workers": settings.workers,
                        "cpus_per_worker": settings.cpus_per_worker,
                        "keep_checkpoints": 1,
                    }
                ),
            }
        )
        config = {**experiment.resolved(run_name), "run": "", "classes": self.classes}
        size = recipe.global_batch_size
        return TrialSpec(
            run_name,
            index,
            round,
            seed,
            dict(params),
            experiment,
            self.classes,
            images_per_epoch=batching.steps_per_epoch(len(self.images["train"]), size) * size,
            fingerprint=fingerprint.compute_fingerprint(config, self.shards),
            is_confirmation=is_confirmation,
        )

    def log_cost(self, planned: Sequence[tuple[int, TrialSpec]]) -> None:
        """Logs the maximum cost of the sweep; in GPU-hours, by the paper's throughput on an A100, if it uses a proxy.

        Args:
            planned: numbers of trials, each with a sample of these trials.
        """
        counts: Counter[int] = Counter()
        for count, spec in planned:
            counts[spec.epochs] += count
        trials = " and ".join(f"{count} trials of {epochs} epochs" for epochs, count in counts.items() if count)
        sample = planned[0][1]
        cost = ""
        if self.settings.proxy is not None:
            hours = [(count, estimate_gpu_hours(spec)) for count, spec in planned]
            gpu_hours = sum(count * hour for count, hour in hours if hour is not None)
            cost = (
                f"; cost: {gpu_hours:,.1f} GPU-hours of an A100 for arithmetic alone: expect more"
                if gpu_hours
                else "; cost: unknown, as the paper has no throughput of these models"
            )
        logger.info(
            "%s: at most %s, %s images of %d classes at %d pixels each%s",
            self.title,
            trials,
            f"{sample.images_per_epoch:,}",
            self.num_classes,
            sample.experiment.data.image_size,
            cost,
        )


def estimate_gpu_hours(spec: TrialSpec) -> float | None:
    """Estimates a trial's training time on one A100, from the forward throughput in the paper's Table 1.

    An H uses the row of its X. The cost scales with the FLOPs of the resolution and size. None if the table lacks the
    model.
    """
    run = spec.experiment.run(spec.run_name)
    name = baseline_name(run.model)
    row = next((row for row in flopeq.table1() if row.model == name and row.throughput_a100_im_s), None)
    if row is None:
        return None
    side = spec.experiment.data.image_size
    flops = complexity(build(run.model, device="meta", num_classes=1000, **run.args), (3, side, side)).flops
    rate = row.throughput_a100_im_s * row.gflops_per_img * 1e9 / flops / TRAIN_STEP_COST
    return spec.epochs * spec.images_per_epoch / rate / 3600


def shorten_recipe(recipe: Recipe, epochs: int | None) -> Recipe:
    """Returns the recipe with `epochs` epochs and proportional warm-up and cooldown; None keeps it unchanged."""
    if epochs is None:
        return recipe
    phases = {field: getattr(recipe, field) for field in ("warmup_epochs", "cooldown_epochs")}
    shorter = {field: max(1, round(span * epochs / recipe.epochs)) for field, span in phases.items() if span}
    return recipe.model_copy(update={"epochs": epochs, **shorter})
