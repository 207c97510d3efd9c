"""Batches from indexed shards, in any order and resumable at any step.

The order is a pure function of (seed, epoch, rank, world size). Global batch b of an epoch holds the positions
[b G, (b+1) G) of the order of the epoch, where G is the global batch size. Rank r takes the r-th contiguous part of
each batch, in whole mixup groups. The augmentation of an image depends only on its position, and the mixing of a group
only on the position of the group (see `augment`). So every world size and a resumed run see the same pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.base.schema import Data, Recipe
from pipeline.loading import augment
from pipeline.loading.datasets import ImageDataset
from pipeline.loading.loader import MIXUP_STREAM, BatchDecoder, BatchRequest, Loader


class Batch(NamedTuple):
    """A microbatch: all or some of the images of one rank in a global batch."""

    images: Tensor
    """(B, 3, H, W) float32, normalized."""
    labels: Tensor
    """(B,) int64."""
    rows: Tensor
    """(B,) int64, rows in the index of the split. `IndexedImages.keys(rows)` returns the names of the images."""
    seeds: tuple[int, ...] = ()
    """One seed per group of `mixup_group` images, for the function from `augment.build_mixup`."""
    ends_step: bool = True
    """Whether this is the last microbatch of the rank in the global batch."""


def epoch_order(num_images: int, *, seed: int, epoch: int, num_repeats: int = 1, global_batch_size: int = 1) -> Tensor:
    """Returns the rows of an epoch in their order, (num_images,) int64. By default it is a permutation.

    Repeated augmentation (Hoffer et al. 2020; Berman et al. 2019): if `num_repeats` is above 1, each of the first
    num_images / num_repeats images of the permutation is repeated `num_repeats` times, in one global batch unless a
    batch ends in between. A batch of G images holds all first repeats, then all second ones, and so on. So the repeats
    of an image are at least G // num_repeats positions apart. They are never in one mixup group, and never on the same
    rank if there are at least `num_repeats` equal ranks.
    """
    generator = torch.Generator().manual_seed(augment.derive_seed(seed, epoch))
    order = torch.randperm(num_images, generator=generator)
    if num_repeats == 1:
        return order
    position = torch.arange(num_images)
    repeated_order = (position // global_batch_size * num_repeats + position % num_repeats).argsort(stable=True)
    return order[repeated_order // num_repeats]


def steps_per_epoch(num_images: int, global_batch_size: int) -> int:
    """Returns the number of global batches of a training epoch. The last incomplete batch is dropped.

    Raises: ValueError if there are not enough images for one global batch.
    """
    if num_images < global_batch_size:
        raise ValueError(f"a global batch of {global_batch_size} needs more than the {num_images} training images")
    return num_images // global_batch_size


class BatchLoader:
    """The batches of one rank, from loader processes that serve all epochs and splits and end with the context.

    Args:
        images: the images of `train` and `val`, or of one of them.
        batch_size: number of images per microbatch, in training a multiple of `mixup_group`. None uses the whole part
            of a rank in a global batch.
        loader_workers: number of loader processes. 0 decodes in this process.
    """

    def __init__(
        self,
        images: Mapping[str, ImageDataset],
        recipe: Recipe,
        data: Data,
        *,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int | None = None,
        loader_workers: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.images, self.recipe, self.device = images, recipe, device
        self.rank, self.world_size, self.batch_size = rank, world_size, batch_size
        self._normalize = augment.Normalize(data, device)
        decoders = {}
        if "train" in images:
            erasing = augment.RandomErasingSampler(recipe, data.image_size) if recipe.random_erasing else None
            decoders["train"] = BatchDecoder(images["train"], augment.build_train_transform(recipe, data), erasing)
        if "val" in images:
            decoders["val"] = BatchDecoder(images["val"], augment.build_eval_transform(recipe, data))
        self._loader = Loader(decoders, workers=loader_workers, device=device)

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self._loader.close()

    def train_batches(self, *, seed: int, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yields this rank's part of every global batch of an epoch, augmented, from `start_step` on.

        A global batch is divided into whole groups of `mixup_group` images, so ranks may get unequal numbers of images.

        Raises: ValueError if a batch does not consist of whole groups, if there are more ranks than groups, if repeats
            of an image would share a group, or if there are not enough images for a global batch.
        """
        recipe, num_images = self.recipe, len(self.images["train"])
        size, group, num_repeats = recipe.global_batch_size, recipe.mixup_group, recipe.repeated_augmentation
        start, stop = self._rank_part()
        order = epoch_order(num_images, seed=seed, epoch=epoch, num_repeats=num_repeats, global_batch_size=size)
        microbatch_size = self.batch_size or stop - start
        positions = [
            range(step * size + offset, step * size + min(offset + microbatch_size, stop))
            for step in range(start_step, steps_per_epoch(num_images, size))
            for offset in range(start, stop, microbatch_size)
        ]
        epoch_seed = augment.derive_seed(seed, epoch)
        requests = (
            BatchRequest("train", microbatch, order[microbatch.start : microbatch.stop].tolist(), epoch_seed)
            for microbatch in positions
        )
        for microbatch, decoded in zip(positions, self._loader.load(requests), strict=True):
            inputs = self._normalize(decoded.pixels)
            if decoded.patches is not None:
                augment.erase_patches(inputs, decoded.patches)
            yield Batch(
                inputs,
                decoded.labels.to(self.device, non_blocking=True),
                order[microbatch.start : microbatch.stop],
                tuple(augment.derive_seed(epoch_seed, position, MIXUP_STREAM) for position in microbatch[::group]),
                microbatch.stop % size == stop % size,
            )

    def val_batches(self) -> Iterator[Batch]:
        """Yields batches in which every image of the split occurs exactly once over all ranks, in the index's order.

        Ranks may get unequal numbers of batches, or none. Make collective calls only after the loop.
        """
        num_images = len(self.images["val"])
        start, stop = (num_images * part // self.world_size for part in (self.rank, self.rank + 1))
        batch_size = self.batch_size or num_images
        positions = [range(offset, min(offset + batch_size, stop)) for offset in range(start, stop, batch_size)]
        requests = (BatchRequest("val", microbatch, list(microbatch), seed=0) for microbatch in positions)
        for microbatch, decoded in zip(positions, self._loader.load(requests), strict=True):
            labels = decoded.labels.to(self.device, non_blocking=True)
            yield Batch(self._normalize(decoded.pixels), labels, torch.arange(microbatch.start, microbatch.stop))

    def _rank_part(self) -> tuple[int, int]:
        """Returns where this rank's part of a global batch starts and stops."""
        recipe, world_size = self.recipe, self.world_size
        size, group, num_repeats = recipe.global_batch_size, recipe.mixup_group, recipe.repeated_augmentation
        num_groups = size // group
        if size % group or (self.batch_size or group) % group:
            raise ValueError(
                f"batches of {size} and {self.batch_size} images do not consist of whole groups of {group}"
            )
        if world_size > num_groups:
            raise ValueError(f"a global batch of {num_groups} groups does not divide among {world_size} workers")
        if num_repeats > 1 and group > size // num_repeats:
            raise ValueError(
                f"groups of {group} images in a global batch of {size} would contain several of {num_repeats} repeats"
            )
        start, stop = (num_groups * part // world_size * group for part in (self.rank, self.rank + 1))
        return start, stop


def train_batches(
    images: ImageDataset,
    recipe: Recipe,
    data: Data,
    *,
    seed: int,
    epoch: int,
    start_step: int = 0,
    **loader_args: Any,
) -> Iterator[Batch]:
    """Yields the batches of one epoch. `BatchLoader` documents the arguments; it keeps its processes over epochs."""
    with BatchLoader({"train": images}, recipe, data, **loader_args) as loader:
        yield from loader.train_batches(seed=seed, epoch=epoch, start_step=start_step)


def val_batches(images: ImageDataset, recipe: Recipe, data: Data, **loader_args: Any) -> Iterator[Batch]:
    """Yields the batches of one pass over validation images. `BatchLoader` documents the arguments."""
    with BatchLoader({"val": images}, recipe, data, **loader_args) as loader:
        yield from loader.val_batches()
