"""Builds what a recipe describes, with timm: model, optimizer, schedule, loss, moving average."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from flopeq.models.build import build
from pipeline.base.errors import ConfigError
from pipeline.base.schema import Data, Recipe, Run, Train
from pipeline.loading import augment


def build_model(run: Run, recipe: Recipe, *, num_classes: int, seed: int, device: str = "cpu") -> nn.Module:
    """Builds a new model whose weights depend on the seed only. Torch's global generator does not change.

    Raises: ModelError for a model or an argument that does not exist; ConfigError if the model has no stochastic depth.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(run.model, device=device, num_classes=num_classes, **run.args)
    _set_drop_path_rates(model, recipe)
    return model


def _set_drop_path_rates(model: nn.Module, recipe: Recipe) -> None:
    """Sets stochastic depth by the recipe's rule, which replaces timm's rule for the model's family."""
    if not recipe.drop_path:
        return
    branches_by_block = [
        [(block, name) for name, _ in block.named_children() if name.startswith("drop_path")]
        for block in model.modules()
    ]
    blocks = list(filter(None, branches_by_block))
    if not blocks:
        raise ConfigError(f"drop_path {recipe.drop_path}: {type(model).__name__} has no blocks to drop: set it to 0")
    last = max(len(blocks) - 1, 1)
    for number, branches in enumerate(blocks):
        rate = recipe.drop_path * (1 if recipe.drop_path_rule == "constant" else number / last)
        for block, name in branches:
            setattr(block, name, DropPath(rate))


def check_recipe(recipe: Recipe, data: Data, train: Train) -> None:
    """Checks a recipe together with data and training settings. Raises: ConfigError, which says what to change."""
    batch, group = recipe.global_batch_size, recipe.mixup_group
    if batch % group:
        valid_sizes = [size for size in range(2, min(batch, 512) + 1) if batch % size == 0]
        raise ConfigError(
            f"global_batch_size {batch} is not a multiple of mixup_group {group}: "
            f"use one of {', '.join(map(str, valid_sizes))}"
        )
    if group % 2 and (recipe.mixup_alpha or recipe.cutmix_alpha):
        raise ConfigError(f"mixup pairs images, so mixup_group must be even, not {group}")
    copies = recipe.repeated_augmentation
    if copies > 1 and group > batch // copies:
        raise ConfigError(
            f"mixup_group {group} would hold several of the {copies} copies of an image: use at most "
            f"{batch // copies} of a global batch of {batch}"
        )
    if train.most_workers > batch // group:
        raise ConfigError(
            f"train.workers {train.most_workers}: a global batch of {batch} in groups of {group} images "
            f"has work for at most {batch // group}"
        )
    if train.batch_per_worker != "auto" and train.batch_per_worker % group:
        valid_sizes = [group * count for count in (1, 2, 4, 8) if group * count <= batch]
        raise ConfigError(
            f"train.batch_per_worker {train.batch_per_worker} is no whole number of groups of "
            f"mixup_group {group}: take {', '.join(map(str, valid_sizes))} or auto"
        )
    if recipe.warmup_epochs + recipe.cooldown_epochs >= recipe.epochs:
        raise ConfigError(
            f"warmup_epochs {recipe.warmup_epochs} and cooldown_epochs {recipe.cooldown_epochs} leave "
            f"none of the {recipe.epochs} epochs for the decay between them"
        )
    augment.build_train_transform(recipe, data)
    build_loss(recipe)


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Builds timm's optimizer with timm's parameter groups: no weight decay on biases, norms and `no_weight_decay`."""
    # timm's LAMB clips the global norm at 1 by default; here only clip_grad_norm sets clipping.
    optimizer_args: dict[str, Any] = {"max_grad_norm": None} if recipe.optimizer == "lamb" else {}
    return create_optimizer_v2(
        model, recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay, **optimizer_args
    )


def build_scheduler(
    recipe: Recipe, optimizer: torch.optim.Optimizer, steps_per_epoch: int, warmup_steps: int | None = None
) -> Scheduler:
    """Builds timm's schedule over `epochs - cooldown_epochs`, then `min_lr`. The warm-up starts at the first step.

    Args:
        warmup_steps: number of steps of the warm-up, if the schedule is updated at every step; None: that of
            `warmup_epochs`.
    """
    warmup_epochs = recipe.warmup_epochs if warmup_steps is None else warmup_steps / steps_per_epoch
    schedule, _ = create_scheduler_v2(
        optimizer,
        recipe.schedule,
        num_epochs=recipe.epochs - recipe.cooldown_epochs,
        cooldown_epochs=recipe.cooldown_epochs,
        warmup_epochs=warmup_epochs,  # type: ignore  # timm multiplies it by `updates_per_epoch`, so it may be a fraction
        warmup_lr=recipe.warmup_lr,
        min_lr=recipe.min_lr,
        step_on_epochs=recipe.schedule_step == "epoch",
        updates_per_epoch=steps_per_epoch,
    )
    assert schedule is not None  # timm has none only for the schedule "none"
    return schedule


def build_loss(recipe: Recipe) -> nn.Module:
    """Builds the loss of logits (B, K) against dense targets (B, K), which already include mixing and smoothing."""
    if recipe.loss == "ce":
        return SoftTargetCrossEntropy()
    if recipe.label_smoothing:
        raise ConfigError("loss: bce counts every class of a target above 0 as 1: set label_smoothing to 0")
    return BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)


def build_ema(recipe: Recipe, model: nn.Module) -> ModelEmaV3 | None:
    """Builds the moving average of the weights, or None if the recipe has none."""
    return None if recipe.ema_decay is None else ModelEmaV3(model, decay=recipe.ema_decay)
