"""The trainings of the scaling study: every arm in every size for every budget, and on fewer images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from flopeq.measure.flops import Complexity, complexity
from flopeq.models.build import ModelError, build
from pipeline.base.config import Experiment, override_recipe
from pipeline.base.errors import ConfigError
from pipeline.base.scaling_params import Scaling
from pipeline.base.schema import Recipe, Run
from pipeline.plan import TRAIN_STEP_COST, dataset_size

MIN_STEPS = 20
"""A training of fewer steps is left out: its schedule has hardly begun."""

STEP_RECIPE: Mapping[str, Any] = {
    "epochs": 1,
    "warmup_epochs": 0,
    "cooldown_epochs": 0,
    "schedule_step": "step",
    "ema_decay": None,
}
"""Fields of the recipe that do not apply. To the loop, a training is one epoch; its last weights are evaluated."""

_UNKNOWN_IMAGES = 10**12

Costs = Mapping[tuple[str, str], Complexity]
"""(arm, size) -> parameters, and FLOPs of the forward pass of one image."""


@dataclass(frozen=True)
class Training:
    """One training of the study."""

    study: Literal["compute", "data"]
    arm: str
    size: str
    seed: int
    budget: float
    """FLOPs asked for."""
    params: int
    flops_image: int
    """Counted FLOPs of the forward pass of one image."""
    steps: int
    global_batch_size: int
    unique_images: int
    fraction: float
    """`unique_images` as a fraction of the data set."""

    @property
    def name(self) -> str:
        """Unique in the study. It does not depend on which other trainings there are."""
        fraction = "" if self.fraction == 1 else f"-{self.fraction:g}"
        return f"{self.arm}-{self.size}-{self.budget:g}{fraction}-seed{self.seed}"

    @property
    def images_seen(self) -> int:
        return self.steps * self.global_batch_size

    @property
    def epochs(self) -> float:
        """How often each different image is seen, on average."""
        return self.images_seen / self.unique_images

    @property
    def compute(self) -> int:
        """FLOPs of the training: for each image seen, a forward pass and, at twice its cost, a backward pass."""
        return TRAIN_STEP_COST * self.flops_image * self.images_seen


@dataclass(frozen=True)
class Plan:
    """The trainings of a study, and why some sizes are left out at some budgets."""

    trainings: Sequence[Training]
    left_out: Sequence[str]


def scaling_of(experiment: Experiment) -> Scaling:
    """Returns the study's settings. Raises: ConfigError if the experiment has no study."""
    if experiment.scaling is None:
        raise ConfigError("params.yaml: scaling is null, so there is no scaling study")
    return experiment.scaling


def make_run(experiment: Experiment, arm: str, size: str) -> Run:
    """Returns the network of an arm in a size."""
    scaling = scaling_of(experiment)
    args = {**scaling.args, **scaling.sizes[size], **scaling.arms[arm].args}
    return Run(model=scaling.arms[arm].model, args=args, recipe=scaling.recipe)


def make_recipe(experiment: Experiment, arm: str) -> Recipe:
    """Returns the recipe of an arm as a training of one epoch."""
    scaling = scaling_of(experiment)
    return override_recipe(experiment.recipes[scaling.recipe], {**scaling.arms[arm].recipe, **STEP_RECIPE})


def check_study(experiment: Experiment) -> None:
    """Builds every network of the study without weights, and plans its trainings.

    Raises: ConfigError for an arm, a size or a budget that cannot be trained.
    """
    try:
        num_images, num_classes = dataset_size(experiment)
    except ConfigError:  # no shards yet: no number of epochs is too large, and no subset too small
        num_images, num_classes = _UNKNOWN_IMAGES, 10
    plan_study(experiment, count_costs(experiment, num_classes), num_images)


def count_costs(experiment: Experiment, num_classes: int) -> Costs:
    """Counts parameters and FLOPs of every arm in every size, on the meta device.

    Raises: ConfigError for a model or an argument that does not exist, or that does not fit the images.
    """
    scaling, side, counted, costs = scaling_of(experiment), experiment.data.image_size, {}, {}
    for arm in scaling.arms:
        for size in scaling.sizes:
            run = make_run(experiment, arm, size)
            key = (run.model, repr(sorted(run.args.items())))  # arms that differ in their recipe only
            if key not in counted:
                try:
                    model = build(run.model, device="meta", num_classes=num_classes, **run.args)
                    counted[key] = complexity(model, (3, side, side))
                except (ModelError, AssertionError, RuntimeError) as error:
                    message = " ".join(str(error).split())
                    raise ConfigError(f"scaling: arm {arm} in size {size}: {message}") from None
            costs[arm, size] = counted[key]
    return costs


def plan_study(experiment: Experiment, costs: Costs, num_images: int) -> Plan:
    """Returns the plan of a study on a data set of `num_images` training images.

    Raises: ConfigError for a budget that no size of an arm can spend, or a subset smaller than a batch.
    """
    scaling = scaling_of(experiment)
    trainings, left_out = [], []
    for arm in scaling.arms:
        for budget in scaling.budgets:
            reasons = []
            for size in scaling.sizes:
                training = _make_training(experiment, costs, num_images, arm, size, budget)
                if reason := _why_not(training, scaling.max_epochs):
                    reasons.append(f"{size} would take {reason}")
                else:
                    trainings.append(training)
            if len(reasons) == len(scaling.sizes):
                raise ConfigError(
                    f"scaling.budgets: no size of {arm} can spend {budget:g} FLOPs: {', '.join(reasons)}; a training "
                    f"has at least {MIN_STEPS} steps and at most {scaling.max_epochs:g} epochs (scaling.max_epochs)"
                )
            left_out += [f"{arm} at {budget:g} FLOPs: {reason}" for reason in reasons]
    trainings += _data_trainings(experiment, costs, num_images, trainings)
    seeds = range(experiment.seed, experiment.seed + scaling.seeds)
    return Plan([replace(training, seed=seed) for training in trainings for seed in seeds], left_out)


def _data_trainings(experiment: Experiment, costs: Costs, num_images: int, known: Sequence[Training]) -> list[Training]:
    """Returns the trainings of the data study, without those that the study of compute has already."""
    scaling = scaling_of(experiment)
    if (unique := scaling.unique_images) is None:
        return []
    trainings = []
    for arm in scaling.arms:
        whole = _make_training(experiment, costs, num_images, arm, unique.size, unique.budget)
        if whole.steps < MIN_STEPS:
            raise ConfigError(
                f"scaling.unique_images.budget: {unique.budget:g} FLOPs are {whole.steps} steps of {arm} in size "
                f"{unique.size}; a training has at least {MIN_STEPS}"
            )
        for fraction in sorted(set(unique.fractions), reverse=True):
            subset = replace(whole, study="data", unique_images=round(fraction * num_images), fraction=fraction)
            if subset.unique_images < subset.global_batch_size:
                raise ConfigError(
                    f"scaling.unique_images.fractions: {fraction:g} of {num_images:,} images are "
                    f"{subset.unique_images}, fewer than a batch of {subset.global_batch_size}"
                )
            if fraction < 1 or replace(subset, study="compute") not in known:
                trainings.append(subset)
    return trainings


def _make_training(
    experiment: Experiment, costs: Costs, num_images: int, arm: str, size: str, budget: float
) -> Training:
    """Returns the training on all images that spends the budget, or less by at most a step."""
    cost, batch = costs[arm, size], make_recipe(experiment, arm).global_batch_size
    steps = int(budget // (TRAIN_STEP_COST * cost.flops * batch))
    return Training("compute", arm, size, experiment.seed, budget, cost.params, cost.flops, steps, batch, num_images, 1)


def _why_not(training: Training, max_epochs: float) -> str | None:
    """Returns how long a training would be, if it is too short or too long."""
    if training.steps < MIN_STEPS:
        return f"{training.steps} steps"
    if training.epochs > max_epochs:
        return f"{training.epochs:.0f} epochs"
    return None
