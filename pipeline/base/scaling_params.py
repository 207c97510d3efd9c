"""The section `scaling` of params.yaml: the trainings of the scaling study, and how they are compared."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt

from pipeline.base.schema import Fraction, NameStr, Section, TrialParams


class Arm(Section):
    """A network that the study trains in every size, with its own changes to the recipe."""

    model: str
    """Name of the model in timm's registry."""
    args: dict[str, Any] = {}
    """Keyword arguments of this model, in addition to those of all arms and of the size."""
    recipe: dict[str, Any] = {}
    """Fields of the recipe to replace, with their new values, for example `{flop_prob: 0.5}`."""
    transpose: bool = False
    """Whether the network sees every image transposed, in training and in validation. E is then equivariant to
    flipping the image upside down: the same FLOPs, and a symmetry that the labels of most data sets lack."""


class UniqueImages(Section):
    """The data study: trainings of one size and one budget on fewer and fewer different images."""

    fractions: tuple[Annotated[float, Field(gt=0, le=1)], ...]
    """Numbers of different training images, as fractions of the data set. Every subset has the classes in the
    proportions of the data set, and a smaller subset is part of a larger one."""
    size: str
    """Name of the size, which is a key of `sizes`."""
    budget: PositiveFloat
    """FLOPs of each training, as in `budgets`. All trainings of an arm see the same number of images, some of them
    more often."""


class Scaling(TrialParams):
    """The scaling study. Its arms are trained in every size for every budget."""

    arms: dict[NameStr, Arm]
    """Networks to compare, by name."""
    args: dict[str, Any] = {}
    """Keyword arguments of the models of all arms. `num_classes` is set from the data."""
    sizes: dict[NameStr, dict[str, Any]]
    """Sizes by name: keyword arguments of the models, such as `{embed_dim: 64, num_heads: 2}`."""
    recipe: str
    """Name of the recipe of all arms, which is a key of `recipes`. Its `epochs`, `warmup_epochs` and `cooldown_epochs`
    do not apply: a budget sets the number of steps."""
    warmup: Fraction
    """Linear warm-up, as a fraction of the steps of a training."""
    budgets: tuple[PositiveFloat, ...]
    """FLOPs of a training, counted as 3 times those of a forward pass for each image seen."""
    max_epochs: PositiveFloat
    """Maximum number of times that a training on all images sees each of them. A size that needs more to spend a budget
    is left out at this budget, and so is one that spends it in fewer than 20 steps. If all sizes of an arm are left
    out, that is an error. The data study has no maximum."""
    unique_images: UniqueImages | None
    """The data study. None leaves it out."""
    seeds: PositiveInt
    """Number of seeds of each training: the seed of the experiment and the ones that follow it. A seed sets the initial
    weights, the order of the images and the subset of the data study."""
    baseline: str
    """Name of the arm that the others are compared with."""
    equivariant: str
    """Name of the arm whose gain over the baseline is measured."""
    augmented: str | None
    """Name of the arm that is the baseline with flop augmentation. None if there is none."""
    bootstrap: PositiveInt
    """Number of bootstrap resamples for intervals."""
