"""The settings of `train` that change speed and memory but not results, apart from rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import set_fused_attn
from torch import nn

from pipeline.base.errors import ConfigError
from pipeline.base.schema import Recipe, Train
from pipeline.training import loop
from pipeline.training import recipe as recipes


def apply_backend_settings(settings: Train) -> None:
    """Sets TF32 and fused attention for the whole process. Call it before building models."""
    torch.set_float32_matmul_precision("high" if settings.tf32 else "highest")
    set_fused_attn(settings.fused_attention)


def apply_model_settings(model: nn.Module, settings: Train) -> nn.Module:
    """Applies the memory format and, if enabled, activation checkpointing. Returns the model.

    Raises: ConfigError if the model does not support activation checkpointing.
    """
    if settings.activation_checkpointing:
        try:
            model.set_grad_checkpointing()  # type: ignore[operator]  # timm's, by contract
        except (AttributeError, AssertionError):
            name = type(model).__name__
            raise ConfigError(f"train.activation_checkpointing: {name} does not support it; set it to false") from None
    return model.to(memory_format=torch.channels_last) if settings.channels_last else model


def candidate_batch_sizes(rank_batch_size: int, group_size: int) -> list[int]:
    """Batch sizes to try, largest first: the rank's whole batch, then the mixup group times powers of two."""
    doubled = [
        group_size << power
        for power in range((rank_batch_size // group_size).bit_length())
        if group_size << power < rank_batch_size
    ]
    return [rank_batch_size, *reversed(doubled)]


def find_max_batch_size(
    model: nn.Module, recipe: Recipe, sizes: Sequence[int], *, image_size: int, num_classes: int, amp: str | None
) -> int:
    """Returns the first of the sizes whose training step fits into memory. The weights do not change.

    Raises: ConfigError if not even the last size fits.
    """
    for size in sizes:
        try:
            _try_training_step(model, recipe, size, image_size, num_classes, amp)
            return size
        except torch.OutOfMemoryError:
            continue
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
    raise ConfigError(
        f"a batch of {sizes[-1]} images does not fit the GPU's memory: use a smaller model or image size, or a "
        f"smaller mixup_group, which is the smallest batch that a worker can process"
    )


def _try_training_step(
    model: nn.Module, recipe: Recipe, size: int, image_size: int, num_classes: int, amp: str | None
) -> None:
    """Runs a training step on random images at learning rate 0, which also disables weight decay."""
    device = next(model.parameters()).device
    optimizer = recipes.build_optimizer(recipe.model_copy(update={"lr": 0.0}), model)
    with loop.autocast(device, amp):
        logits = model.train()(torch.randn(size, 3, image_size, image_size, device=device))
        loss = recipes.build_loss(recipe)(logits, torch.full((size, num_classes), 1 / num_classes, device=device))
    loss.backward()
    optimizer.step()
