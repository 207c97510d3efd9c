"""The sections of params.yaml as typed, frozen models. Every field is documented with its unit and source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]

NameStr = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Data(Section):
    name: str
    """Name of the data set. Its shards are written to `data/shards/<name>`."""
    source: str
    """Path of the images: a folder with ImageNet's archives, Kaggle's folder or zip, a folder tree
    `{train,val}/<class>/*`, class folders `<class>/*`, a folder with IDX files (the MNIST family), or a folder or
    fsspec URL with existing WebDataset shards. Relative paths start at the root of the repository."""
    source_hint: str | None = None
    """How to get the images. It ends the error about a missing `source`."""
    labels: Literal["own", "imagenet"]
    """How to number the classes: `own` uses 0 to n-1 in the order of the class names, `imagenet` uses the indices of
    ImageNet's 1,000 classes."""
    class_names: tuple[str, ...] | None
    """Names of the classes of IDX files, in the order of the labels. None uses Fashion-MNIST's if the labels are its
    own, and otherwise the labels."""
    on_bad_image: Literal["error", "skip"]
    """How to treat an image that cannot be decoded: `error` stops the sharding, `skip` leaves the image out and lists
    it in the manifest."""
    image_size: PositiveInt
    """Side length of the square training and test images, in pixels."""
    interpolation: Literal["bilinear", "bicubic"]
    """Interpolation filter for every resize."""
    mean: tuple[float, float, float]
    """Mean of each RGB channel, in [0, 1]. It is subtracted from the images."""
    std: tuple[float, float, float]
    """Standard deviation of each RGB channel, in [0, 1]. The images are divided by it."""
    images_per_shard: PositiveInt
    """Number of images in each tar."""
    cache_gib: Annotated[float, Field(ge=0)]
    """Maximum size of each node's cache for shards at a URL, in GiB. 0 turns the cache off."""
    flop_invariant: Annotated[bool, Field(exclude=True)] = True  # for the report only: no part of what a run trains on
    """Whether an image and its mirror image have the same label. If not, as for digits and text, the report says that
    E(X) is expected to fall behind X."""
    has_up: Annotated[bool, Field(exclude=True)] = True  # for the report only, too
    """Whether the images have an up, as photographs do, and aerial images and micrographs do not. If they have, the
    report says that networks for larger groups than the flop's are expected to fall behind E(X)."""
    further_val: dict[NameStr, Path] = {}
    """Further validation sets for `evaluate`: a mapping from a name to a folder `<class>/*` of images. The class
    folders have the class names of the data set. If the data set has ImageNet's 1,000 classes, the folders may instead
    be named by label, 0 to 999, as in ImageNet-V2 (Recht et al. 2019)."""

    @property
    def shards(self) -> Path:
        """Folder of the tars, the indices and the manifest."""
        return Path("data/shards") / self.name


class Run(Section):
    model: str
    """Name of the model in timm's registry. flopeq registers its models there too."""
    args: dict[str, Any] = {}
    """Keyword arguments of the model. `num_classes` is set from the data."""
    recipe: str
    """Name of the training recipe: a key of `recipes` or of `sweeps.tuned`. A tuned recipe may also change `args`."""
    seed: int | None = None
    """Random seed of this run. None uses the seed of the experiment."""


class SymmetrizedRun(Section):
    """A trained run whose network is averaged over a group of symmetries. It is evaluated and measured, not trained."""

    weights_of: str
    """Name of the run whose network and weights to use, which is a key of `models`. The seed is that run's."""
    group: str
    """Group of symmetries: `flop`, `flip`, `turn` (by 180 degrees), `transpose`, `c4`, `d4`, or names joined by `*`,
    such as `flop*flip`."""
    how: Literal["average", "choose", "canonical"] = "average"
    """How to make the logits invariant: `average` takes their mean over the group, `choose` takes those with the
    largest probability, `canonical` turns every image into one fixed position and computes one pass."""


class Recipe(Section):
    epochs: PositiveInt
    """Number of passes over the training images."""
    global_batch_size: PositiveInt
    """Number of images per optimizer step, summed over all workers."""
    optimizer: Literal["adamw", "lamb"]
    """Optimizer, by its name in timm."""
    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate. It is not scaled with the batch size."""
    weight_decay: Annotated[float, Field(ge=0)]
    """Decoupled weight decay. It is not applied to biases, norms and the parameters in the model's
    `no_weight_decay`."""
    clip_grad_norm: Annotated[float, Field(gt=0)] | None
    """Maximum global norm of the gradient. None turns clipping off."""
    schedule: Literal["cosine"]
    """Schedule of the learning rate from `lr` to `min_lr`."""
    schedule_step: Literal["step", "epoch"]
    """How often the learning rate is updated: after every optimizer step or once per epoch."""
    warmup_epochs: Annotated[int, Field(ge=0)]
    """Number of epochs of linear warm-up from `warmup_lr` to `lr`."""
    warmup_lr: Annotated[float, Field(ge=0)]
    """Learning rate at the first step of the warm-up."""
    min_lr: Annotated[float, Field(ge=0)]
    """Learning rate at the end of the decay."""
    cooldown_epochs: Annotated[int, Field(ge=0)]
    """Number of epochs at `min_lr` after the decay. They count towards `epochs`."""
    loss: Literal["ce", "bce"]
    """Loss function: `ce` is cross-entropy, `bce` is binary cross-entropy with a target of 1 for every mixed class
    (DeiT III)."""
    mixed_precision: bool
    """Whether to run the forward pass in the autocast dtype of `train.amp`."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    """Label smoothing: the weight of the uniform distribution in the targets."""
    drop_path: Annotated[float, Field(ge=0, lt=1)]
    """Stochastic depth rate. `drop_path_rule` distributes it over the blocks."""
    drop_path_rule: Literal["constant", "linear"]
    """How the rate varies over the blocks: `constant` uses `drop_path` in every block, `linear` increases from 0 in the
    first block to `drop_path` in the last."""
    random_crop_scale: tuple[Fraction, Fraction]
    """Minimum and maximum area of the random crop, as a fraction of the image area."""
    random_crop_ratio: tuple[float, float]
    """Minimum and maximum aspect ratio of the random crop."""
    flop_prob: Fraction
    """Probability of mirroring a training image."""
    auto_augment: str | None
    """Augmentation policy, by its name in timm: `3a` (ThreeAugment), `rand-m9-mstd0.5-inc1`, ... None turns it off."""
    color_jitter: Annotated[float, Field(ge=0)]
    """Strength of the color jitter. 0 turns it off."""
    random_erasing: Fraction
    """Probability of erasing a rectangle of a training image."""
    mixup_alpha: Annotated[float, Field(ge=0)]
    """Parameter of mixup's beta distribution. 0 turns mixup off."""
    cutmix_alpha: Annotated[float, Field(ge=0)]
    """Parameter of cutmix's beta distribution. 0 turns cutmix off."""
    mixup_group: PositiveInt
    """Number of images in a group for mixup and cutmix. Images are paired within their group, and each group draws its
    own mixing parameters. timm uses the batch of one GPU as the group. A worker always processes whole groups, also
    when mixup and cutmix are off."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None
    """Decay of the exponential moving average (EMA) of the weights. The average is validated and saved with the
    weights. None turns it off."""
    repeated_augmentation: PositiveInt
    """Number of times each image is repeated in an epoch, with a different augmentation each time. The length of an
    epoch does not change. 1 turns it off."""
    test_crop_ratio: Annotated[float, Field(gt=0, le=1)]
    """Side length of the test crop divided by the shorter side of the resized image."""


class Train(Section):
    workers: PositiveInt | tuple[PositiveInt, PositiveInt]
    """Number of Ray Train workers, one process each. A pair [min, max] uses as many as fit on the cluster, and adapts
    while the run trains."""
    cpus_per_worker: PositiveInt
    """Number of CPU cores, and of torch threads, per worker."""
    gpu: Literal["auto"] | bool
    """Whether each worker uses a GPU. `auto` uses GPUs if the cluster has any."""
    loader_workers: Annotated[int, Field(ge=0)]
    """Number of processes per worker that decode images, for training and validation. They live as long as the
    training. 0 decodes in the worker itself."""
    batch_per_worker: Literal["auto"] | PositiveInt
    """Number of images per forward pass. If a worker's share of the global batch is larger, it accumulates gradients.
    `auto` uses as many images as fit on the GPU, which a restarted training remembers, or the whole share on a CPU."""
    checkpoint_steps: PositiveInt | None
    """Number of optimizer steps between checkpoints within an epoch. None saves only at the end of an epoch."""
    amp: Literal["bf16", "fp16", None]
    """Autocast dtype of the forward pass. `fp16` scales the loss and needs a GPU. None turns autocast off."""
    tf32: bool
    """Whether to compute float32 matrix products in TF32 (10-bit mantissa) on GPUs that support it."""
    fused_attention: bool
    """Whether to compute attention in one kernel (torch's scaled_dot_product_attention) instead of two matrix products
    and a softmax."""
    channels_last: bool
    """Whether to store images and convolution weights in the channels-last memory format. It makes ConvNeXt faster on
    GPUs."""
    activation_checkpointing: bool
    """Whether to keep only the inputs of the blocks and recompute the other activations in the backward pass. It uses
    less memory and takes a third more time."""
    compile: bool
    """Whether to train with torch.compile. Without a C++ compiler the run logs a warning, trains
    in eager mode, and says so in run.json and the report."""
    keep_checkpoints: PositiveInt
    """Number of most recent checkpoints to keep. Each includes the best weights so far."""

    @property
    def least_workers(self) -> int:
        """Minimum number of workers that training needs to start."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """Maximum number of workers that training uses."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class Throughput(Section):
    batch_size: PositiveInt
    """Number of images per forward pass."""
    warmup: Annotated[int, Field(ge=0)]
    """Number of untimed warm-up passes before the timed passes."""
    runs: PositiveInt
    """Number of timed passes per model. The passes alternate between the models."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Autocast dtype. `float32` turns autocast off."""
    compile: bool
    """Whether to measure with torch.compile."""
    paper_sizes: bool
    """Whether to measure X and E of the paper's S sizes on this machine too. It takes up to three minutes on two cores,
    and several on a GPU, where compiling takes longer. The settings above do not apply to it."""


class Range(Section):
    """The values that a sweep may give to one field. Set exactly one of these."""

    choice: tuple[Any, ...] | None = None
    """A list of values to choose from."""
    uniform: tuple[float, float] | None = None
    """A number between the two bounds, uniformly distributed."""
    log_uniform: tuple[float, float] | None = None
    """A number between the two bounds, with a uniformly distributed logarithm."""
    integer: tuple[int, int] | None = None
    """An integer between the two bounds, both included."""

    @model_validator(mode="after")
    def _check_one_range(self) -> Range:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(type(self).model_fields)}")
        if self.choice is not None:
            if not self.choice:
                raise ValueError("choice needs at least one value")
        elif self.bounds[0] >= self.bounds[1]:
            raise ValueError("the first number must be below the second")
        elif self.log_uniform is not None and self.log_uniform[0] <= 0:
            raise ValueError("log_uniform needs numbers above 0")
        return self

    @property
    def bounds(self) -> tuple[Any, ...]:
        """All values of a choice, or the two bounds of a range."""
        values = (self.choice, self.uniform, self.log_uniform, self.integer)
        return next(value for value in values if value is not None)


class AshaParams(Section):
    grace_epochs: PositiveInt
    """Number of epochs that every trial trains before it can be stopped."""
    reduction_factor: Annotated[int, Field(ge=2)]
    """ASHA's reduction factor: 1 in `reduction_factor` trials continues at each rung. The rungs are `grace_epochs`
    times the powers of this factor."""


class ProxyParams(Section):
    """A cheaper substitute for the data set that trials train on."""

    image_size: PositiveInt | None
    """Side length of the images in pixels, also used as the model's `img_size`. None uses the size of the data set."""
    classes: Annotated[int, Field(ge=2)] | None
    """Number of classes, evenly spaced in the list of classes. None uses all classes."""


class TrialParams(Section):
    """What the trials of a sweep or of the scaling study run on."""

    workers: PositiveInt
    """Number of workers per trial. Each reserves `cpus_per_worker` cores, one more core per loader process, and a GPU
    if `train.gpu` asks for one. A single worker runs in the process of the trial; several workers are a Ray Train
    run."""
    cpus_per_worker: PositiveInt
    """Number of CPU cores, and of torch threads, per worker."""

    def cpus(self, train: Train) -> int:
        """Returns the number of CPU cores that a trial reserves, including those of its loader processes."""
        return self.workers * (self.cpus_per_worker + train.loader_workers)


class SweepParams(TrialParams):
    runs: tuple[str, ...]
    """Names of the runs to sweep, which are keys of `models`."""
    seeds: PositiveInt
    """Number of seeds per configuration: the seed of the run and the ones that follow it. The hybrid sweep needs at
    least 3 to tell splits apart."""
    epochs: PositiveInt | None
    """Number of epochs per trial, except in a confirmation. Warm-up and cooldown are shortened in proportion. None uses
    the epochs of the recipe."""
    proxy: ProxyParams | None
    """A cheaper substitute for the data set that trials train on. None trains on the whole data set."""


class RecipeSweepParams(SweepParams):
    space: dict[str, Range]
    """Search space for all runs: fields of a recipe, and arguments of the model as `args.<name>`."""
    own_space: dict[str, dict[str, Range]] = {}
    """Additional search space per run: a mapping from the name of a run to its ranges."""
    searcher: Literal["optuna", "random", "grid"]
    """Search algorithm: `optuna` is Optuna's TPE, `random` is random search, and `grid` is grid search over all
    combinations of choices and integers."""
    trials: PositiveInt | None
    """Number of configurations per run. The first is the recipe of the run itself. None tries the whole grid."""
    round: PositiveInt
    """Number of configurations to suggest at once. The next round starts when all of them have finished. A trial is
    compared only with earlier rounds when ASHA decides whether to stop it, so results do not depend on the order in
    which trials finish."""
    asha: AshaParams | None
    """Early stopping of trials with ASHA. None never stops a trial early."""
    confirm_seeds: Annotated[int, Field(ge=0)]
    """Maximum number of new seeds with which the best configuration and the recipe of the run are trained for all
    epochs of the recipe, one seed at a time. The best configuration replaces the recipe of the run only if it is better
    by the one-sided Mann-Whitney test at 5 %, for which at least 3 seeds are needed. 0 skips this confirmation, and
    every run keeps its own recipe."""
    rank_configs: Annotated[int, Field(ge=2)]
    """Number of configurations, including the recipe of the run and the best one, that are trained for all epochs of
    the recipe with the first of these seeds. They show whether the ranking of the search carries over. Fewer than 4 are
    too few to show it."""

    @field_validator("confirm_seeds")
    @classmethod
    def _check_confirm_seeds(cls, value: int) -> int:
        if value in (1, 2):
            raise ValueError("so few seeds can never show a gain: give 0, or at least 3")
        return value


Split = Annotated[int, Field(ge=0, strict=True)] | str
"""A number of equivariant blocks, or groups by depth such as "d4:1,c2:2"."""


class HybridSweepParams(SweepParams):
    """The hybrid sweep. Its `runs` name one X or hybrid model of each family. The group is that of the hybrid, and the
    flop's for X.
    """

    splits: Literal["all"] | tuple[Split, ...]
    """Splits to try: numbers of equivariant blocks, and groups by depth such as "d4:1,c2:2", which are values of the
    models' argument `symmetry`. `all` tries every number from 0 (X) to the depth of the model (E)."""
    flop_budget: Annotated[float, Field(gt=0, le=1)]
    """Maximum FLOPs of the best split, as a fraction of the FLOPs of X."""
    compile: bool
    """Whether to measure throughput with torch.compile. Batch size, dtype and number of passes come from
    `throughput`."""


class TunedRecipe(Section):
    """A recipe that is found by a sweep."""

    base: str
    """Name of the recipe to override, which is a key of `recipes`."""
    override: str
    """Path of a file with the mappings `recipe` and `args`, such as `sweeps/recipe/<run>/best.yaml`."""


class RecipeOverride(Section):
    """Content of an override file. A sweep writes it as `best.yaml`."""

    recipe: dict[str, Any] = {}
    """Fields of the recipe to replace, with their new values."""
    args: dict[str, Any] = {}
    """Arguments of the model to replace, with their new values."""


class Sweeps(Section):
    recipe: RecipeSweepParams
    """The sweep over training recipes."""
    hybrid: HybridSweepParams
    """The sweep over the number of equivariant blocks of a hybrid model."""
    tuned: dict[NameStr, TunedRecipe]
    """Tuned recipes by name. A run can use them like `recipes`."""


class Tracking(Section):
    experiment: str
    """Name of the MLflow experiment that holds the runs of this study."""
