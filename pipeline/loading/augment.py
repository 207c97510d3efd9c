"""Augmentation with timm and torchvision, as a pure function of (seed, epoch, position).

Randomness: timm and torchvision draw from the global generators of `random`, `numpy` and `torch`. `seed_generators`
seeds all three from a hash of (seed, epoch, position in the order of the epoch) before each image, and
`preserve_rng_state` restores their state after each batch. So the augmentation of an image does not depend on the
process that decodes it, on the number of workers, or on earlier draws. The random draws of the model (drop path) are
not affected either.

Legend: B batch, H W pixels. Images are uint8 (3, H, W) until `Normalize` converts a batch to float32. Their channels
are innermost in memory: decoders write them in this format, PIL reads it without a copy, and torch resizes it fastest.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from pipeline.base.errors import ConfigError
from pipeline.base.schema import Data, Recipe


def derive_seed(*parts: int) -> int:
    """Returns a 64-bit seed that is a pure function of the integers, on every machine and in every version."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def seed_generators(seed: int) -> None:
    """Seeds the global generators of `random`, `numpy` and `torch` (on the CPU) with a 64-bit seed."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)
    # torch.manual_seed takes 155 us per call instead of 1 us, as it looks for accelerators each time.
    torch.default_generator.manual_seed(seed)


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Context manager that restores the state of the three global generators."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class RandomResizedCrop(RandomResizedCropAndInterpolation):
    """timm's random crop, resized by torch's uint8 kernel. Matches PIL to 0.01 levels on average and is 4 times as
    fast."""

    def __call__(self, img: Tensor) -> Tensor:
        top, left, height, width = self.get_params(img, self.scale, self.ratio)
        crop = img[None, :, top : top + height, left : left + width]
        crop = crop.contiguous(memory_format=torch.channels_last)
        mode = InterpolationMode(self.interpolation).value
        return F.interpolate(crop, self.size, mode=mode, antialias=True)[0]


class PILTransform:
    """Applies a transform of PIL images, such as timm's policies, to a tensor."""

    def __init__(self, transform: Callable[[Image.Image], Image.Image]) -> None:
        self.transform = transform

    def __call__(self, image: Tensor) -> Tensor:
        augmented = self.transform(Image.fromarray(image.permute(1, 2, 0).numpy()))
        return torch.from_numpy(np.array(augmented)).permute(2, 0, 1)


def build_train_transform(recipe: Recipe, data: Data) -> v2.Compose:
    """Random resized crop, flop, timm's augmentation policy and color jitter, in timm's order.

    uint8 (3, H, W) of any size -> uint8 (3, image_size, image_size). Draws from the global generators: call
    `seed_generators` first, inside `preserve_rng_state`.
    Departs: timm disables color jitter with RandAugment; here the recipe alone decides.
    Raises: ConfigError if timm does not know the policy.
    """
    steps: list[Callable] = [
        RandomResizedCrop(data.image_size, recipe.random_crop_scale, recipe.random_crop_ratio, data.interpolation)
    ]
    if recipe.flop_prob:
        steps.append(v2.RandomHorizontalFlip(recipe.flop_prob))
    if recipe.auto_augment or recipe.color_jitter:
        jitter = {"color_jitter": (recipe.color_jitter,) * 3 if recipe.color_jitter else None}
        try:
            _, policy, _ = cast(
                tuple,
                transforms_imagenet_train(
                    data.image_size,
                    auto_augment=recipe.auto_augment,
                    **cast(Any, jitter),
                    force_color_jitter=True,
                    interpolation=data.interpolation,
                    mean=data.mean,
                    separate=True,
                ),
            )
        except AssertionError as error:
            raise ConfigError(f"auto_augment: timm has no policy {recipe.auto_augment!r}: {error}") from None
        steps.append(PILTransform(policy))
    return v2.Compose(steps)


def build_eval_transform(recipe: Recipe, data: Data) -> v2.Compose:
    """Resizes the shorter side to image_size / test_crop_ratio and crops the central square.

    uint8 (3, H, W) of any size -> uint8 (3, image_size, image_size).
    """
    shorter_side = math.floor(data.image_size / recipe.test_crop_ratio)
    resize = v2.Resize([shorter_side], InterpolationMode(data.interpolation), antialias=True)
    return v2.Compose([resize, v2.CenterCrop(data.image_size)])


class Normalize:
    """(B, 3, H, W) uint8 -> float32: subtracts the mean and divides by the standard deviation, per channel."""

    def __init__(self, data: Data, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.shift = 255 * torch.tensor(data.mean, device=device).view(3, 1, 1)
        self.scale = 1 / (255 * torch.tensor(data.std, device=device).view(3, 1, 1))

    def __call__(self, images: Tensor) -> Tensor:
        normalized = images.to(self.device, non_blocking=True).to(torch.float32, memory_format=torch.contiguous_format)
        return normalized.sub_(self.shift).mul_(self.scale)


class ErasedPatches(NamedTuple):
    """The rectangles of a batch that random erasing replaces, and their new values."""

    boxes: Tensor
    """(P, 5) int64: index of the image in the batch, top, left, height, width."""
    values: Tensor
    """float32, the values (3, height, width) of all rectangles, flat, one rectangle after another."""


class RandomErasingSampler:
    """timm's random erasing with normal noise: draws what `erase_patches` replaces in a batch. Each image has its own
    seed.

    It needs no images, so loader processes draw the noise, and a batch of images gets it in one copy.
    """

    def __init__(self, recipe: Recipe, image_size: int) -> None:
        self.erase = RandomErasing(recipe.random_erasing, mode="pixel", device="cpu")
        self.image_size = image_size

    def __call__(self, seeds: Iterable[int]) -> ErasedPatches:
        boxes, values = [], [torch.empty(0)]
        with preserve_rng_state():
            for index, seed in enumerate(seeds):
                seed_generators(seed)
                image = _RecordedImage(self.image_size)
                self.erase(image)
                boxes += [[index, *box] for box in image.boxes]
                values += image.values
        return ErasedPatches(torch.tensor(boxes, dtype=torch.int64).view(-1, 5), torch.cat(values))


class _RecordedImage:
    """Stands for a float32 image (3, H, W) in timm's random erasing, and records what is assigned to it."""

    dtype = torch.float32

    def __init__(self, side: int) -> None:
        self.side = side
        self.boxes: list[tuple[int, int, int, int]] = []
        """Top, left, height, width of each assignment."""
        self.values: list[Tensor] = []

    def size(self) -> tuple[int, int, int]:
        return 3, self.side, self.side

    def __setitem__(self, region: tuple[slice, slice, slice], values: Tensor) -> None:
        _, rows, columns = region
        self.boxes.append((rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start))
        self.values.append(values.flatten())


def erase_patches(images: Tensor, patches: ErasedPatches) -> Tensor:
    """Replaces the rectangles in normalized images (B, 3, H, W), in place. Does not wait for the images' device."""
    values, start = patches.values.to(images.device, non_blocking=True), 0
    for index, top, left, height, width in patches.boxes.tolist():
        stop = start + 3 * height * width
        images[index, :, top : top + height, left : left + width] = values[start:stop].view(3, height, width)
        start = stop
    return images


MixupFn = Callable[[Tensor, Tensor, Sequence[int]], tuple[Tensor, Tensor]]


def build_mixup(recipe: Recipe, num_classes: int) -> MixupFn:
    """(images (B, 3, H, W), labels (B,), seeds) -> (mixed images, soft targets (B, num_classes)); images in place.

    Applies timm's mixup or cutmix, and label smoothing. The batch is divided into as many groups of equal size as there
    are seeds. Each group is mixed within itself, first image with last, with parameters drawn from its seed. So the
    result does not depend on how whole groups are distributed over ranks.
    """
    smoothing = recipe.label_smoothing
    if not (recipe.mixup_alpha or recipe.cutmix_alpha):
        return lambda images, labels, seeds: (images, mixup_target(labels, num_classes, smoothing=smoothing))
    mixup = Mixup(
        mixup_alpha=recipe.mixup_alpha,
        cutmix_alpha=recipe.cutmix_alpha,
        label_smoothing=smoothing,
        num_classes=num_classes,
    )

    def transform(images: Tensor, labels: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        targets = []
        with preserve_rng_state():
            for seed, *group in zip(seeds, images.chunk(len(seeds)), labels.chunk(len(seeds)), strict=True):
                seed_generators(seed)
                targets.append(mixup(*group)[1])
        return images, torch.cat(targets)

    return transform
