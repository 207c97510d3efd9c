"""How many images fit: the largest batch whose forward and backward pass a GPU has memory for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pipeline import loop
from pipeline import recipe as recipes
from pipeline.config import ConfigError, Recipe


def batch_sizes(share: int, group: int) -> list[int]:
    """Sizes to try, largest first: the whole share, then the group that is mixed together times powers of two."""
    doubled = [group << power for power in range((share // group).bit_length()) if group << power < share]
    return [share, *reversed(doubled)]


def largest_batch(
    model: nn.Module, recipe: Recipe, sizes: Sequence[int], *, image_size: int, num_classes: int, amp: str
) -> int:
    """The first of the sizes whose training step fits; the weights are as they were afterwards.

    Raises: ConfigError if not even the last one does.
    """
    for size in sizes:
        try:
            _step(model, recipe, size, image_size, num_classes, amp)
            return size
        except torch.OutOfMemoryError:
            continue
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
    raise ConfigError(
        f"a batch of {sizes[-1]} images does not fit the GPU's memory: take a smaller model or image, or a smaller "
        f"mixup_group, which is the least that a worker takes at once"
    )


def _step(model: nn.Module, recipe: Recipe, size: int, image_size: int, num_classes: int, amp: str) -> None:
    """A training step at learning rate 0, and so without decay, on random images."""
    device = next(model.parameters()).device
    optimizer = recipes.optimizer(recipe.model_copy(update={"lr": 0.0}), model)
    with loop.autocast(device, amp):
        logits = model.train()(torch.randn(size, 3, image_size, image_size, device=device))
        loss = recipes.loss(recipe)(logits, torch.full((size, num_classes), 1 / num_classes, device=device))
    loss.backward()
    optimizer.step()
