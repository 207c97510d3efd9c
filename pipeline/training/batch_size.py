"""The number of images per forward pass: as many as fit the GPU, found once by trying a training step.

A step is tried as training runs it: compiled, with the average, with the space that DistributedDataParallel takes, and
twice, because the optimizer allocates its state in the first step. It is tried on a copy of the network, before the
network itself and the state of a checkpoint are on the GPU.
"""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.base.errors import ConfigError
from pipeline.base.files import open_filesystem
from pipeline.base.schema import Recipe
from pipeline.training import loop
from pipeline.training import recipe as recipes


@dataclass(frozen=True)
class TrialStep:
    """What the memory of a training step depends on, apart from its number of images."""

    recipe: Recipe
    image_size: int
    num_classes: int
    device: torch.device
    amp: str | None = None
    compile: bool = False
    world_size: int = 1

    def run(self, model: nn.Module, size: int) -> None:
        """Trains a copy of the model for two steps on random images. Raises: OutOfMemoryError if they do not fit."""
        trained = copy.deepcopy(model).to(self.device).train()
        forward = torch.compile(trained) if self.compile else trained
        optimizer, loss_fn = recipes.build_optimizer(self.recipe, trained), recipes.build_loss(self.recipe)
        reserved: list[Any] = [recipes.build_ema(self.recipe, trained)]
        if self.world_size > 1:  # DistributedDataParallel copies the gradients into buckets
            reserved.append([torch.empty_like(parameter) for parameter in trained.parameters()])
        images = torch.randn(size, 3, self.image_size, self.image_size, device=self.device)
        reserved.append(torch.empty_like(images))  # the next batch
        targets = torch.full((size, self.num_classes), 1 / self.num_classes, device=self.device)
        for _ in range(2):
            with loop.autocast(self.device, self.amp):
                loss = loss_fn(forward(images), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def share_of_rank(recipe: Recipe, world_size: int) -> int:
    """Returns the number of images of the global batch that the rank with the most images has."""
    return -(-recipe.global_batch_size // recipe.mixup_group // world_size) * recipe.mixup_group


def candidate_batch_sizes(rank_batch_size: int, group_size: int) -> list[int]:
    """Batch sizes to try, largest first: the rank's whole batch, then the mixup group times powers of two."""
    doubled = [
        group_size << power
        for power in range((rank_batch_size // group_size).bit_length())
        if group_size << power < rank_batch_size
    ]
    return [rank_batch_size, *reversed(doubled)]


def find_max_batch_size(model: nn.Module, step: TrialStep, sizes: Sequence[int]) -> int:
    """Returns the first of the sizes whose training step fits into memory. The model does not change.

    Raises: ConfigError if not even the last size fits.
    """
    for size in sizes:
        try:
            step.run(model, size)
            return size
        except torch.OutOfMemoryError:
            pass
        finally:
            if step.compile:
                torch._dynamo.reset()  # or the next size would compile for any size
            gc.collect()
            torch.cuda.empty_cache()
    raise ConfigError(
        f"a batch of {sizes[-1]} images does not fit the GPU's memory: use a smaller model or image size, or a "
        f"smaller mixup_group, which is the smallest batch that a worker can process"
    )


class SavedBatchSize:
    """The size that was found, in a file beside the checkpoints of a configuration.

    A restarted training uses it again, if it runs under the same conditions. So it does not try again, and its sums
    keep their order.

    Args:
        checkpoints: folder or URL of the checkpoints of the configuration.
    """

    def __init__(self, checkpoints: str, step: TrialStep) -> None:
        self._files, root = open_filesystem(checkpoints.rpartition("/")[0])
        self._path = f"{root}/batch_size.json"
        self._conditions = _describe_conditions(step)

    def load(self) -> int | None:
        """Returns the size that was found under these conditions, or None."""
        try:
            with self._files.open_input_stream(self._path) as file:
                saved: Mapping[str, Any] = json.loads(file.read())
        except (OSError, ValueError):
            return None
        return saved["batch_size"] if saved["conditions"] == self._conditions else None

    def save(self, batch_size: int) -> None:
        """Writes the size."""
        with self._files.open_output_stream(self._path) as file:
            file.write(json.dumps({"batch_size": batch_size, "conditions": self._conditions}, indent=1).encode())


def _describe_conditions(step: TrialStep) -> dict[str, Any]:
    """Returns what the size depends on beside the configuration, whose fingerprint names the folder."""
    gpu = torch.cuda.get_device_properties(step.device)
    return {
        "device": gpu.name,
        "memory_bytes": gpu.total_memory,
        "workers": step.world_size,
        "compiled": step.compile,
        "amp": step.amp,
    }
