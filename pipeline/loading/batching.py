"""Batches from indexed shards, in any order and resumable at any step.

The order is a pure function of (seed, epoch, rank, world size). Global batch b of an epoch holds the positions
[b G, (b+1) G) of the order of the epoch, where G is the global batch size. Rank r takes the r-th contiguous part of
each batch, in whole mixup groups. The augmentation of an image depends only on its position, and the mixing of a group
only on the position of the group (see `augment`). So every world size and a resumed run see the same pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.base.errors import ShardError, SourceError
from pipeline.base.schema import Data, Recipe
from pipeline.loading import augment
from pipeline.loading.datasets import ImageDataset

PREFETCH_FACTOR = 4  # batches that each loader process prepares in advance

_ERASING_STREAM, _MIXUP_STREAM = 1, 2  # distinguishes seeds for erasing and mixup from those for the crop


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


def train_batches(
    images: ImageDataset,
    recipe: Recipe,
    data: Data,
    *,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    batch_size: int | None = None,
    loader_workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Yields this rank's part of every global batch of an epoch, augmented, from `start_step` on.

    A global batch is divided into whole groups of `mixup_group` images, so ranks may get unequal numbers of images.

    Args:
        batch_size: number of images per microbatch, a multiple of `mixup_group`. None uses the whole part.
    Raises: ValueError if a batch does not consist of whole groups, if there are more ranks than groups, if repeats of
        an image would share a group, or if there are not enough images for a global batch.
    """
    size, group, num_repeats = recipe.global_batch_size, recipe.mixup_group, recipe.repeated_augmentation
    num_groups = size // group
    if size % group or (batch_size or group) % group:
        raise ValueError(f"batches of {size} and {batch_size} images do not consist of whole groups of {group}")
    if world_size > num_groups:
        raise ValueError(f"a global batch of {num_groups} groups does not divide among {world_size} workers")
    if num_repeats > 1 and group > size // num_repeats:
        raise ValueError(
            f"groups of {group} images in a global batch of {size} would contain several of {num_repeats} repeats"
        )
    order = epoch_order(len(images), seed=seed, epoch=epoch, num_repeats=num_repeats, global_batch_size=size)
    start, stop = (num_groups * part // world_size * group for part in (rank, rank + 1))
    microbatch_size = batch_size or stop - start
    positions = [
        range(step * size + offset, step * size + min(offset + microbatch_size, stop))
        for step in range(start_step, steps_per_epoch(len(images), size))
        for offset in range(start, stop, microbatch_size)
    ]
    fetch = BatchDataset(
        images, augment.build_train_transform(recipe, data), order, seed=augment.derive_seed(seed, epoch)
    )
    normalize, erase = augment.Normalize(data, device), augment.RandomErasingBatch(recipe)
    for microbatch, (pixels, labels) in zip(
        positions, _iterate_loader(fetch, positions, loader_workers, device), strict=True
    ):
        inputs = normalize(pixels)
        if recipe.random_erasing:
            erase(inputs, (augment.derive_seed(fetch.seed, position, _ERASING_STREAM) for position in microbatch))
        yield Batch(
            inputs,
            labels.to(device, non_blocking=True),
            order[microbatch.start : microbatch.stop],
            tuple(augment.derive_seed(fetch.seed, position, _MIXUP_STREAM) for position in microbatch[::group]),
            microbatch.stop % size == stop % size,
        )


def val_batches(
    images: ImageDataset,
    recipe: Recipe,
    data: Data,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    loader_workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Yields batches in which every image of the split occurs exactly once over all ranks, in the order of the index.

    Ranks may get unequal numbers of batches, or none. Make collective calls only after the loop.
    """
    num_images = len(images)
    start, stop = (num_images * part // world_size for part in (rank, rank + 1))
    positions = [range(offset, min(offset + batch_size, stop)) for offset in range(start, stop, batch_size)]
    fetch = BatchDataset(images, augment.build_eval_transform(recipe, data), torch.arange(num_images), seed=0)
    normalize = augment.Normalize(data, device)
    for microbatch, (pixels, labels) in zip(
        positions, _iterate_loader(fetch, positions, loader_workers, device), strict=True
    ):
        labels = labels.to(device, non_blocking=True)
        yield Batch(normalize(pixels), labels, fetch.order[microbatch.start : microbatch.stop])


class BatchDataset(Dataset):
    """positions -> (uint8 (B, 3, H, W), labels (B,)). Seeds the generators for each image from its position."""

    def __init__(
        self, images: ImageDataset, transform: Callable[[Tensor], Tensor], order: Tensor, *, seed: int
    ) -> None:
        self.images, self.transform, self.order, self.seed = images, transform, order, seed

    def __getitem__(self, positions: range) -> tuple[Tensor, Tensor]:
        rows = self.order[positions.start : positions.stop]
        jpegs = self.images.read_jpegs(rows.tolist())
        pixels_BHWC = []
        with augment.preserve_rng_state():
            for position, row, jpeg in zip(positions, rows.tolist(), jpegs, strict=True):
                augment.seed_generators(augment.derive_seed(self.seed, position))
                pixels_BHWC.append(self.transform(self.images.decode(row, jpeg)).permute(1, 2, 0))
        return torch.stack(pixels_BHWC).permute(0, 3, 1, 2), self.images.labels[rows]


class WorkerDataset(Dataset):
    """A BatchDataset for loader processes. It returns errors as values, because torch would wrap them in a
    traceback."""

    def __init__(self, fetch: BatchDataset) -> None:
        self.fetch = fetch

    def __getitem__(self, positions: range) -> tuple[Tensor, Tensor] | ValueError:
        try:
            return self.fetch[positions]
        except (ShardError, SourceError) as error:
            return error


def _iterate_loader(
    fetch: BatchDataset, positions: list[range], loader_workers: int, device: torch.device | str
) -> Iterator[tuple[Tensor, Tensor]]:
    if not loader_workers:
        yield from (fetch[microbatch] for microbatch in positions)
        return
    for fetched in DataLoader(
        WorkerDataset(fetch),
        batch_size=None,
        sampler=positions,
        num_workers=loader_workers,
        prefetch_factor=PREFETCH_FACTOR,
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator(),  # otherwise it draws an unused seed from the global generator
    ):
        if isinstance(fetched, ValueError):
            raise fetched
        yield fetched
