"""Runs the trainings of the scaling study as trials on Ray Tune, and writes scaling/.

`runs.csv` has a row for each training that has ended, `losses.parquet` the loss of every validation image, and
`study.json` what the fits need to know of params.yaml. The rest is fitted to them (analysis.py).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flopeq.registry import describe
from pipeline.base.config import Experiment
from pipeline.base.files import read_json, write_json
from pipeline.loading import datasets
from pipeline.scaling import analysis, grid, rows
from pipeline.scaling.grid import Training
from pipeline.shards import manifests
from pipeline.sweeps import engine
from pipeline.sweeps.trial import TrialOutcome, TrialSpec
from pipeline.training import fingerprint
from pipeline.training import recipe as recipes
from pipeline.training.step_training import StepTraining

logger = logging.getLogger(__name__)

OUTPUT_DIR = Path("scaling")

CONFIDENCE = 0.9
"""Of every interval of the study."""

_CHECKPOINTS = 4  # of a training, unless train.checkpoint_steps sets their distance

_IMAGE_FLOPS = 4e6  # of a forward pass that takes as long as reading and augmenting an image, to estimate what is left


class ScalingStudy:
    """The trials of the study, as pipeline/sweeps runs them."""

    name = title = "scaling"

    def __init__(self, experiment: Experiment) -> None:
        """Raises: ConfigError for an arm, a size or a budget that cannot be trained; ShardError without shards."""
        self.experiment, self.settings = experiment, grid.scaling_of(experiment)
        self.shards = manifests.Shards(experiment.data.shards, cache_gib=experiment.data.cache_gib)
        self.num_images = len(datasets.IndexedImages(self.shards, "train"))
        costs = grid.count_costs(experiment, self.shards.num_classes)
        self.plan = grid.plan_study(experiment, costs, self.num_images)
        self.trials_dir = Path("sweeps/trials", self.name).absolute()
        self.trials_dir.mkdir(parents=True, exist_ok=True)

    def make_trials(self) -> list[TrialSpec]:
        """Makes the trials in the order in which they start: by seed, and the longest first."""
        ordered = sorted(self.plan.trainings, key=lambda training: (training.seed, -_cost(training)))
        return [self._make_trial(index, training) for index, training in enumerate(ordered)]

    def _make_trial(self, index: int, training: Training) -> TrialSpec:
        settings, train, transpose = self.settings, self.experiment.train, self.settings.arms[training.arm].transpose
        run = grid.make_run(self.experiment, training.arm, training.size)
        recipe = grid.make_recipe(self.experiment, training.arm)
        train = train.model_copy(
            update={
                "workers": settings.workers,
                "cpus_per_worker": settings.cpus_per_worker,
                "keep_checkpoints": 1,
                "checkpoint_steps": train.checkpoint_steps or -(-training.steps // _CHECKPOINTS),
            }
        )
        recipes.check_recipe(recipe, self.experiment.data, train)
        experiment = self.experiment.model_copy(
            update={
                "models": {training.arm: run.model_copy(update={"recipe": "trial", "seed": training.seed})},
                "recipes": {"trial": recipe},
                "train": train,
            }
        )
        step_training = StepTraining(
            training.steps,
            round(settings.warmup * training.steps),
            training.unique_images,
            transpose=transpose,
            average_over_flop=not transpose and _is_ordinary(run.model),
        )
        config = {**experiment.resolved(training.arm), "run": "", "step_training": asdict(step_training)}
        return TrialSpec(
            training.arm,
            index,
            0,
            training.seed,
            {name: getattr(training, name) for name in _PARAMS},
            experiment,
            None,
            images_per_epoch=training.images_seen,
            fingerprint=fingerprint.compute_fingerprint(config, self.shards),
            step_training=step_training,
            label=training.name,
            cost=_cost(training),
        )

    def describe(self) -> dict[str, Any]:
        """Returns what the fits need to know of the experiment: study.json."""
        settings = self.settings
        return {
            "data": self.experiment.data.name,
            "flop_invariant": self.experiment.data.flop_invariant,
            "num_images": self.num_images,
            "num_classes": self.shards.num_classes,
            "arms": {name: arm.model_dump(mode="json") for name, arm in settings.arms.items()},
            "sizes": list(settings.sizes),
            "budgets": list(settings.budgets),
            "baseline": settings.baseline,
            "equivariant": settings.equivariant,
            "augmented": settings.augmented,
            "seed": self.experiment.seed,
            "bootstrap": settings.bootstrap,
            "confidence": CONFIDENCE,
            "left_out": list(self.plan.left_out),
        }


_PARAMS = ("study", "arm", "size", "budget", "params", "flops_image", "steps", "images_seen", "unique_images", "epochs")
"""Properties of a training that its MLflow run has as parameters."""


def run_study(experiment: Experiment) -> None:
    """Runs or resumes the study and writes scaling/. Without a study, study.json is empty and there is nothing else.

    Raises: ConfigError, ShardError, ClusterError: for invalid parameters, data or cluster.
    """
    if experiment.scaling is None:
        shutil.rmtree(OUTPUT_DIR, ignore_errors=True)
        write_json(OUTPUT_DIR / "study.json", {})
        return
    study = ScalingStudy(experiment)
    for reason in study.plan.left_out:
        logger.info("scaling: left out: %s", reason)
    trainings = {training.name: training for training in study.plan.trainings}
    total = sum(training.compute for training in trainings.values())
    logger.info("scaling: %d trainings, %.3g FLOPs", len(trainings), total)
    table: dict[str, rows.Row] = {}

    def add_row(outcome: TrialOutcome) -> dict[str, float | None]:
        row = table[outcome.spec.name] = rows.make_row(trainings[outcome.spec.name], outcome, study.trials_dir)
        rows.write_runs(OUTPUT_DIR, [table[name] for name in trainings if name in table])
        return _metrics(row)

    OUTPUT_DIR.mkdir(parents=True, exist_ok=True)
    write_json(OUTPUT_DIR / "study.json", study.describe())
    specs = study.make_trials()
    outcomes, reporter = engine.run_sweep(
        study, {study.name: _single_round(specs)}, planned=[(1, spec) for spec in specs], on_outcome=add_row
    )
    by_name = {outcome.spec.name: outcome for outcome in outcomes[study.name]}
    for outcome in by_name.values():  # equal trials are trained once, but each has a row
        add_row(outcome)
    rows.write_losses(OUTPUT_DIR, {name: rows.read_losses(by_name[name], study.trials_dir) for name in trainings})
    analysis.refit(OUTPUT_DIR)
    files = sorted(path for path in OUTPUT_DIR.rglob("*") if path.is_file())
    train_s = sum(outcome.seconds for outcome in by_name.values())
    reporter.finish({**_multipliers(read_json(OUTPUT_DIR / "fits.json", {})), "cost/train_s": train_s}, files)


def _single_round(specs: list[TrialSpec]) -> engine.TrialPlan:
    yield specs


def _is_ordinary(model: str) -> bool:
    """Whether a network is not equivariant to the flop."""
    info = describe(model)
    return info is None or info.variant == "X"


def _cost(training: Training) -> float:
    """Returns an estimate of the time of a training, in any unit."""
    return training.images_seen * (training.flops_image + _IMAGE_FLOPS)


def _multipliers(fits: Mapping[str, Any]) -> dict[str, float | None]:
    """Returns the average multipliers and their intervals as metrics of the study's MLflow run."""
    metrics = {}
    for kind in ("compute", "data"):
        for series, found in fits[f"{kind}_multipliers"].items():
            for bound, value in (found["average"] or {}).items():
                metrics[f"{kind}_multiplier/{series.replace(', ', '-')}/{bound}"] = value  # MLflow takes no comma
    return metrics


def _metrics(row: rows.Row) -> dict[str, float | None]:
    """Returns the numbers of a training that its MLflow run has as metrics, to be drawn against one another."""
    names = ("compute", "params", "flops_image", "images_seen", "unique_images", "epochs")
    measured = {
        "val/loss": "val_loss",
        "val/loss_averaged": "val_loss_averaged",
        "val/top1_averaged_pct": "top1_averaged_pct",
    }
    return {f"scaling/{name}": row[name] for name in names} | {key: row[name] for key, name in measured.items()}
