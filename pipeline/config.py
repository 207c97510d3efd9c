"""The typed model of params.yaml: what an experiment is, checked before anything long starts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class ConfigError(ValueError):
    """A mistake in params.yaml; the message says where it is and what to write instead."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Data(_Section):
    name: str
    """Name of the data set; its shards lie in `data/shards/<name>`."""
    source: str
    """Where the images are: ImageNet's archives, Kaggle's folder or zip, a folder tree `{train,val}/<class>/*`, or
    existing WebDataset shards, the last in a folder or at an fsspec URL. Paths are relative to the repository."""
    labels: Literal["own", "imagenet"]
    """`own`: 0 to n-1 in the order of the class names; `imagenet`: the indices of ImageNet's 1,000 classes."""
    on_bad_image: Literal["error", "skip"]
    """What an image that cannot be read does: ends the sharding, or is left out and listed in the manifest."""
    image_size: Positive
    """Side of the square training and test images, in pixels."""
    interpolation: Literal["bilinear", "bicubic"]
    """Filter of every resize."""
    mean: tuple[float, float, float]
    """Mean of the RGB channels, in [0, 1], subtracted from the images."""
    std: tuple[float, float, float]
    """Standard deviation of the RGB channels, in [0, 1], by which the images are divided."""
    images_per_shard: Positive
    """Images in one tar."""
    cache_gib: Annotated[float, Field(ge=0)]
    """Bound, in GiB, of each node's local copies of shards that lie at a URL; 0: none."""
    further_val: dict[Name, Path] = {}
    """Further validation sets for `evaluate`: name -> a folder `<class>/*` of images. Classes are named as the data's,
    or, where those are ImageNet's 1,000, by their labels, 0 to 999, as in ImageNet-V2 (Recht et al. 2019)."""

    @property
    def shards(self) -> Path:
        """Folder of the tars, indices and manifest."""
        return Path("data/shards") / self.name


class Run(_Section):
    model: str
    """Any name in timm's registry, flopeq's included."""
    args: dict[str, Any] = {}
    """Keyword arguments of the model; `num_classes` comes from the data."""
    recipe: str
    """A key of `recipes` or of `sweeps.tuned`; the latter may change `args` too."""
    seed: int | None = None
    """Seed of this run; None: the experiment's."""


class Recipe(_Section):
    epochs: Positive
    """Passes over the training images."""
    global_batch_size: Positive
    """Images per optimizer step, over all workers."""
    optimizer: Literal["adamw", "lamb"]
    """An optimizer of timm's."""
    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate, used as written whatever the batch."""
    weight_decay: Annotated[float, Field(ge=0)]
    """Decoupled weight decay; biases, norms and what the model lists in `no_weight_decay` have none."""
    clip_grad_norm: Annotated[float, Field(gt=0)] | None
    """Bound on the global norm of the gradient; None: off."""
    schedule: Literal["cosine"]
    """Decay of the learning rate from `lr` to `min_lr`."""
    schedule_step: Literal["step", "epoch"]
    """Whether the learning rate changes every optimizer step or once an epoch."""
    warmup_epochs: Annotated[int, Field(ge=0)]
    """Epochs of linear warm-up, from `warmup_lr` to `lr`."""
    warmup_lr: Annotated[float, Field(ge=0)]
    """Learning rate at the first step of the warm-up."""
    min_lr: Annotated[float, Field(ge=0)]
    """Learning rate at the end of the decay."""
    cooldown_epochs: Annotated[int, Field(ge=0)]
    """Epochs at `min_lr` after the decay, inside `epochs`."""
    loss: Literal["ce", "bce"]
    """Cross-entropy, or binary cross-entropy in which every mixed class counts as 1 (DeiT III)."""
    mixed_precision: bool
    """Whether the forward pass runs in the autocast dtype of `train.amp`."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    """Weight of the uniform distribution in the targets."""
    drop_path: Annotated[float, Field(ge=0, lt=1)]
    """Stochastic depth rate."""
    drop_path_rule: Literal["constant", "linear"]
    """`constant`: that rate in every block; `linear`: from 0 in the first block to that rate in the last."""
    random_crop_scale: tuple[Fraction, Fraction]
    """Range of the random crop's area, as a fraction of the image's."""
    random_crop_ratio: tuple[float, float]
    """Range of the random crop's aspect ratio."""
    flop_prob: Fraction
    """Probability of mirroring a training image."""
    auto_augment: str | None
    """timm's name of an augmentation policy: `3a` (ThreeAugment), `rand-m9-mstd0.5-inc1`, ...; None: off."""
    color_jitter: Annotated[float, Field(ge=0)]
    """Strength of the colour jitter; 0: off."""
    random_erasing: Fraction
    """Probability of erasing a rectangle of a training image."""
    mixup_alpha: Annotated[float, Field(ge=0)]
    """Parameter of mixup's beta distribution; 0: off."""
    cutmix_alpha: Annotated[float, Field(ge=0)]
    """Parameter of cutmix's beta distribution; 0: off."""
    mixup_group: Positive
    """Images that mixup and cutmix pair among themselves, in one way drawn for the group: in timm a GPU's batch.
    A worker takes whole groups at once. Without mixing it is the least that a worker takes at once."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None
    """Decay of a moving average of the weights, validated and kept beside them; None: off."""
    repeated_augmentation: Positive
    """Differently augmented copies of an image in an epoch, whose length stays the same; 1: off."""
    test_crop_ratio: Annotated[float, Field(gt=0, le=1)]
    """Side of the test crop over the side of the resized image."""


class Train(_Section):
    workers: Positive | tuple[Positive, Positive]
    """Ray Train workers, one process each; [least, most]: as many as the cluster has room for, while it runs too."""
    cpus_per_worker: Positive
    """CPU cores (and torch threads) of each worker."""
    gpu: Literal["auto"] | bool
    """One GPU per worker: `auto` where the cluster has one."""
    loader_workers: Annotated[int, Field(ge=0)]
    """Processes that decode images, per worker; 0: the worker itself."""
    batch_per_worker: Literal["auto"] | Positive
    """Images of one forward pass; a worker whose share of the global batch is larger accumulates several.
    `auto`: as many as fit a GPU; on a CPU the whole share."""
    checkpoint_steps: Positive | None
    """Optimizer steps between checkpoints within an epoch; None: only at its end."""
    amp: Literal["off", "bf16", "fp16"]
    """Autocast dtype of the forward pass; fp16 scales the loss and needs a GPU."""
    tf32: bool
    """Products of float32 in TF32 where a GPU has it (10 bits of mantissa)."""
    fused_attention: bool
    """Attention in one kernel (torch's scaled_dot_product_attention) instead of two products and a softmax."""
    channels_last: bool
    """Images and convolutions' weights with channels innermost in memory: pays for ConvNeXt on GPUs."""
    activation_checkpointing: bool
    """Keep the blocks' inputs alone and compute the rest again in the backward pass: less memory, a third more time."""
    compile: bool
    """Train through torch.compile (falls back to eager, and says so, without a C++ compiler)."""
    keep_checkpoints: Positive
    """Newest checkpoints kept, each with the best weights so far."""


    @property
    def least_workers(self) -> int:
        """Workers without which training does not start."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """Workers at most."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class Throughput(_Section):
    batch_size: Positive
    """Images per forward pass."""
    warmup: Annotated[int, Field(ge=0)]
    """Untimed passes before the timed ones."""
    runs: Positive
    """Timed passes per model, alternating over the models."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Autocast dtype; float32: no autocast."""
    compile: bool
    """Measure through torch.compile."""


class Range(_Section):
    """The values that a sweep may give to one field: exactly one of these."""

    choice: tuple[Any, ...] | None = None
    """One of these values."""
    uniform: tuple[float, float] | None = None
    """Any number from the first to the second."""
    log_uniform: tuple[float, float] | None = None
    """The same, every factor as likely as any other."""
    integer: tuple[int, int] | None = None
    """A whole number from the first to the second, both included."""

    @model_validator(mode="after")
    def _is_one_range(self) -> Range:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(type(self).model_fields)}")
        if self.choice is not None:
            if not self.choice:
                raise ValueError("choice needs at least one value")
        elif self.extremes[0] >= self.extremes[1]:
            raise ValueError("the first number must be below the second")
        elif self.log_uniform is not None and self.log_uniform[0] <= 0:
            raise ValueError("log_uniform needs numbers above 0")
        return self

    @property
    def extremes(self) -> tuple[Any, ...]:
        """All values of a choice, the two ends of a range of numbers."""
        values = (self.choice, self.uniform, self.log_uniform, self.integer)
        return next(value for value in values if value is not None)


class Asha(_Section):
    grace_epochs: Positive
    """Epochs that every trial may train before it can be stopped."""
    reduction_factor: Annotated[int, Field(ge=2)]
    """One in so many goes on, at `grace_epochs` and at each multiple of it by a power of this."""


class Proxy(_Section):
    """A cheaper stand-in for the data set, which trials train on."""

    image_size: Positive | None
    """Side of the images in pixels, of the model's `img_size` too; None: the data's."""
    classes: Annotated[int, Field(ge=2)] | None
    """So many classes, spread evenly over the list of them; None: all."""


class _Sweep(_Section):
    runs: tuple[str, ...]
    """Keys of `models`."""
    seeds: Positive
    """Every configuration is trained under so many seeds: the run's own and the ones after it."""
    epochs: Positive | None
    """Epochs of a trial, warm-up and cooldown shortened in proportion; None: the recipe's."""
    proxy: Proxy | None
    """What trials train on instead of the data set; None: the data set."""
    workers: Positive
    """Workers of a trial, each with `cpus_per_worker` cores, one per loader process, and a GPU where `train.gpu` says
    so. One worker is the trial's own process; more are a Ray Train run each."""
    cpus_per_worker: Positive
    """CPU cores (and torch threads) of each worker."""

    def cpus(self, train: Train) -> int:
        """Cores that a trial holds, those of its loader processes among them."""
        return self.workers * (self.cpus_per_worker + train.loader_workers)


class RecipeSweep(_Sweep):
    space: dict[str, Range]
    """What is varied: fields of a recipe, and arguments of the model as `args.<name>`."""
    own_space: dict[str, dict[str, Range]] = {}
    """Run name -> what is varied for that run besides."""
    searcher: Literal["optuna", "random", "grid"]
    """Who suggests configurations: Optuna's TPE, chance, or all combinations of choices and whole numbers in turn."""
    trials: Positive | None
    """Configurations per run, the run's own recipe first; None: all of the grid."""
    round: Positive
    """Configurations suggested at once. The next ones follow when all of these have ended, and trials are stopped by
    comparison with earlier rounds only, so that nothing depends on which trial is done first."""
    asha: Asha | None
    """When trials are stopped early; None: never."""
    confirm_seeds: Annotated[int, Field(ge=0)]
    """Further seeds under which the best configuration meets the run's own recipe again; 0: no confirmation."""


class HybridSweep(_Sweep):
    """Its `runs` are one X or H of each family."""

    splits: Literal["all"] | tuple[Annotated[int, Field(ge=0)], ...]
    """Numbers of equivariant blocks to try; `all`: from 0 (X) to the depth (E)."""
    flop_budget: Annotated[float, Field(gt=0, le=1)]
    """The best split is sought among those with at most this fraction of X's FLOPs."""
    compile: bool
    """Measure throughput through torch.compile; batch size, dtype and passes are those of `throughput`."""


class Tuned(_Section):
    """A recipe that a sweep found."""

    base: str
    """A key of `recipes`: what is overridden."""
    override: str
    """A file with the mappings `recipe` and `args`, such as `sweeps/recipe/<run>/best.yaml`."""


class Override(_Section):
    """What an override file holds; a sweep writes it as `best.yaml`."""

    recipe: dict[str, Any] = {}
    """Field -> value, in place of the recipe's."""
    args: dict[str, Any] = {}
    """Argument of the model -> value, in place of the run's."""


class Sweeps(_Section):
    recipe: RecipeSweep
    """Which recipe suits a model."""
    hybrid: HybridSweep
    """Where a hybrid should stop being equivariant."""
    tuned: dict[Name, Tuned] = {}
    """Recipe name -> what a sweep found; a run may name these as it names `recipes`."""


class Tracking(_Section):
    experiment: str
    """MLflow experiment that holds the runs of this study."""


class Experiment(_Section):
    seed: int
    """Seed of the data's order and of every run that names none."""
    data: Data
    models: dict[Name, Run]
    """Run name -> what is trained under it."""
    recipes: dict[Name, Recipe]
    train: Train
    throughput: Throughput
    sweeps: Sweeps
    tracking: Tracking
    storage: str
    """Folder or pyarrow URL under which checkpoints go, as `<storage>/<run>/checkpoints`."""

    def run(self, name: str) -> Run:
        """The run of that name. Raises ConfigError, naming the nearest, when there is none."""
        if name not in self.models:
            raise ConfigError(f"no run named {name!r} in params.yaml{nearest(name, self.models)}")
        return self.models[name]

    def recipe(self, name: str) -> Recipe:
        """The recipe of the run of that name. Raises ConfigError for one that a sweep has yet to find."""
        recipe = self.run(name).recipe
        if recipe not in self.recipes:
            path = self.sweeps.tuned[recipe].override
            raise ConfigError(f"recipe {recipe!r} of run {name!r} is in {path}, which is not there yet: "
                              f"run `dvc repro train@{name}`")
        return self.recipes[recipe]

    def seed_of(self, name: str) -> int:
        """The seed of the run of that name."""
        seed = self.run(name).seed
        return self.seed if seed is None else seed

    def resolved(self, name: str) -> dict[str, Any]:
        """All that defines the training of the run of that name, as plain JSON values."""
        run = self.run(name)
        return {
            "run": name,
            "model": run.model,
            "args": dict(run.args),
            "seed": self.seed_of(name),
            "data": self.data.model_dump(mode="json"),
            "recipe": {"name": run.recipe, **self.recipe(name).model_dump(mode="json")},
            "train": self.train.model_dump(mode="json"),
        }


def load(path: Path | str = "params.yaml") -> Experiment:
    """Reads and checks an experiment. Raises ConfigError with one line per mistake."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path} not found: run from the repository's root")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    try:
        experiment = Experiment.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in _explain(error))) from None
    if problems := _inconsistent(experiment):
        raise ConfigError("\n".join(f"{path}: {line}" for line in problems))
    return _with_tuned(experiment, path.parent)


def overridden(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with some fields changed, checked anew. Raises ConfigError with one line per mistake."""
    try:
        return Recipe.model_validate({**recipe.model_dump(), **changes})
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, Recipe))) from None


def override_of(tuned: Tuned, folder: Path = Path()) -> Override:
    """The content of its override file. Raises: ConfigError for a mistake in it."""
    path = folder / tuned.override
    try:
        return Override.model_validate(yaml.safe_load(path.read_text()) or {})
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in _explain(error, Override))) from None


def _inconsistent(experiment: Experiment) -> list[str]:
    """What of the experiment names something that is not there."""
    sweeps, known, problems = experiment.sweeps, [*experiment.recipes, *experiment.sweeps.tuned], []
    for name, run in experiment.models.items():
        if run.recipe not in known:
            problems.append(f"models.{name}.recipe: no recipe named {run.recipe!r}{nearest(run.recipe, known)}")
    for name, tuned in sweeps.tuned.items():
        if name in experiment.recipes:
            problems.append(f"sweeps.tuned.{name}: recipes has this name as well")
        if tuned.base not in experiment.recipes:
            problems.append(f"sweeps.tuned.{name}.base: no recipe named {tuned.base!r}"
                            f"{nearest(tuned.base, experiment.recipes)}")
    for where, names in (("recipe.runs", sweeps.recipe.runs), ("hybrid.runs", sweeps.hybrid.runs)):
        for name in names:
            if name not in experiment.models:
                problems.append(f"sweeps.{where}: no run named {name!r}{nearest(name, experiment.models)}")
            elif experiment.models[name].recipe in sweeps.tuned:
                problems.append(f"sweeps.{where}: {name} has a recipe that a sweep found: it needs one of recipes")
    for name in sweeps.recipe.own_space:
        if name not in sweeps.recipe.runs:
            problems.append(f"sweeps.recipe.own_space.{name}: none of sweeps.recipe.runs")
    if (sweeps.recipe.trials is None) != (sweeps.recipe.searcher == "grid"):
        problems.append("sweeps.recipe.trials: a number for optuna and random, null for grid")
    return problems


def _with_tuned(experiment: Experiment, folder: Path) -> Experiment:
    """The experiment with the recipes that sweeps have found so far, and what they change in the models."""
    recipes, models = dict(experiment.recipes), dict(experiment.models)
    for name, tuned in experiment.sweeps.tuned.items():
        if not (folder / tuned.override).is_file():
            continue
        override = override_of(tuned, folder)
        try:
            recipes[name] = overridden(recipes[tuned.base], override.recipe)
        except ConfigError as error:
            raise ConfigError(f"{tuned.override}: {error}") from None
        for run_name, run in models.items():
            if run.recipe == name:
                models[run_name] = run.model_copy(update={"args": {**run.args, **override.args}})
    return experiment.model_copy(update={"recipes": recipes, "models": models})


def nearest(name: str, known: Any) -> str:
    """'; did you mean ...?' for the nearest known name, or a list of what is known when there are few."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if len(known) <= 12 else ""


def _explain(error: ValidationError, model: type[BaseModel] = Experiment) -> list[str]:
    lines = []
    for problem in error.errors():
        where = [str(part) for part in problem["loc"] if part != "[key]"]
        if problem["type"] == "extra_forbidden":
            lines.append(f"{'.'.join(where)}: unknown parameter{nearest(where[-1], _fields(model, where[:-1]))}")
        elif problem["type"] == "missing":
            lines.append(f"{'.'.join(where)}: missing")
        else:
            lines.append(f"{'.'.join(where)}: {problem['msg']}, got {problem['input']!r}")
    return lines


def _fields(model: Any, where: list[str]) -> list[str]:
    """Names of the fields of the section at `where`; none where a value may be of several types."""
    for part in where:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        inner = field.annotation if field else model
        model = get_args(inner)[1] if get_origin(inner) is dict else inner
        model = next((arg for arg in get_args(model) if hasattr(arg, "model_fields")), model)
    return list(getattr(model, "model_fields", ()))
