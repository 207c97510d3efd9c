"""What is done to the pixels, from timm and torchvision, as a pure function of (seed, epoch, place).

Randomness: timm and torchvision draw from the global generators of `random`, `numpy` and `torch`. All three
are set from a hash of (seed, epoch, place in the epoch's order) before each image (`reseed`), and given back
as they were after each batch (`borrowed_generators`). So an image's crop depends neither on the process that
decodes it, nor on the number of workers, nor on what was drawn before; and the model's own draws (drop path)
are not touched.

Legend: B batch, H W pixels. Images are uint8 (3, H, W) until `Normalize` makes a batch of them float32. Their
channels are innermost in memory: so decoders write them, PIL takes them without a copy, and torch resizes fastest.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, cast

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

from pipeline.config import ConfigError, Data, Recipe


def fold(*parts: int) -> int:
    """64 bits that are a pure function of the integers: the same on every machine and in every version."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def reseed(seed: int) -> None:
    """Sets the global generators of `random`, `numpy` and `torch` (on CPU) from 64 bits."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)
    # Not torch.manual_seed: 155 us a call here, against 1 us, as it looks for accelerators each time.
    torch.default_generator.manual_seed(seed)


@contextmanager
def borrowed_generators() -> Iterator[None]:
    """Gives the three global generators back as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class RandomResizedCrop(RandomResizedCropAndInterpolation):
    """timm's random crop, resized by torch's kernel for bytes: PIL's pixels to 0.01 levels, 4 times as fast."""

    def __call__(self, img: Tensor) -> Tensor:
        top, left, height, width = self.get_params(img, self.scale, self.ratio)
        crop = img[None, :, top : top + height, left : left + width]
        crop = crop.contiguous(memory_format=torch.channels_last)
        mode = InterpolationMode(self.interpolation).value
        return F.interpolate(crop, self.size, mode=mode, antialias=True)[0]


class Policy:
    """A transform of PIL images, such as timm's policies, as one of tensors."""

    def __init__(self, transform: Callable[[Image.Image], Image.Image]) -> None:
        self.transform = transform

    def __call__(self, image: Tensor) -> Tensor:
        changed = self.transform(Image.fromarray(image.permute(1, 2, 0).numpy()))
        return torch.from_numpy(np.array(changed)).permute(2, 0, 1)


def train_transform(recipe: Recipe, data: Data) -> v2.Compose:
    """Random resized crop, flop, timm's augmentation policy, colour jitter, in timm's order.

    uint8 (3, H, W) of any size -> uint8 (3, image_size, image_size). Draws from the global generators: `reseed`
    before it, inside `borrowed_generators`.
    Departs: timm leaves colour jitter out beside RandAugment; here it is done whenever the recipe says so.
    Raises: ConfigError for a policy that timm does not know.
    """
    steps: list[Callable] = [RandomResizedCrop(
        data.image_size, recipe.random_crop_scale, recipe.random_crop_ratio, data.interpolation
    )]
    if recipe.flop_prob:
        steps.append(v2.RandomHorizontalFlip(recipe.flop_prob))
    if recipe.auto_augment or recipe.color_jitter:
        jitter = {"color_jitter": (recipe.color_jitter,) * 3 if recipe.color_jitter else None}
        try:
            _, policy, _ = cast(tuple, transforms_imagenet_train(
                data.image_size, auto_augment=recipe.auto_augment, **cast(Any, jitter), force_color_jitter=True,
                interpolation=data.interpolation, mean=data.mean, separate=True,
            ))
        except AssertionError as error:
            raise ConfigError(f"auto_augment: {recipe.auto_augment!r} is none of timm's: {error}") from None
        steps.append(Policy(policy))
    return v2.Compose(steps)


def eval_transform(recipe: Recipe, data: Data) -> v2.Compose:
    """Resize of the shorter side to image_size / test_crop_ratio, then the central square.

    uint8 (3, H, W) of any size -> uint8 (3, image_size, image_size).
    """
    shorter_side = math.floor(data.image_size / recipe.test_crop_ratio)
    resize = v2.Resize([shorter_side], InterpolationMode(data.interpolation), antialias=True)
    return v2.Compose([resize, v2.CenterCrop(data.image_size)])


class Normalize:
    """(B, 3, H, W) uint8 -> float32, less the mean and divided by the standard deviation, per channel."""

    def __init__(self, data: Data, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.shift = 255 * torch.tensor(data.mean, device=device).view(3, 1, 1)
        self.scale = 1 / (255 * torch.tensor(data.std, device=device).view(3, 1, 1))

    def __call__(self, images: Tensor) -> Tensor:
        floats = images.to(self.device, non_blocking=True).to(torch.float32, memory_format=torch.contiguous_format)
        return floats.sub_(self.shift).mul_(self.scale)


class Erase:
    """timm's random erasing, in place, with normal noise on the normalised batch; one seed an image."""

    def __init__(self, recipe: Recipe) -> None:
        # Noise from the CPU's generator, which `reseed` sets, wherever the images are.
        self.erase = RandomErasing(recipe.random_erasing, mode="pixel", device="cpu")

    def __call__(self, images: Tensor, seeds: Iterable[int]) -> Tensor:
        with borrowed_generators():
            for image, seed in zip(images, seeds, strict=True):
                reseed(seed)
                self.erase(image)
        return images


BatchTransform = Callable[[Tensor, Tensor, Sequence[int]], tuple[Tensor, Tensor]]


def batch_transform(recipe: Recipe, num_classes: int) -> BatchTransform:
    """(images (B, 3, H, W), labels (B,), seeds) -> (mixed images, soft targets (B, num_classes)); images in place.

    timm's mixup or cutmix, and label smoothing. The images are as many groups of one size as there are seeds, and each
    group is mixed within itself, first with last, in a way drawn from its seed: ranks with whole groups see what one
    rank with all of them would.
    """
    smoothing = recipe.label_smoothing
    if not (recipe.mixup_alpha or recipe.cutmix_alpha):
        return lambda images, labels, seeds: (images, mixup_target(labels, num_classes, smoothing=smoothing))
    mixup = Mixup(
        mixup_alpha=recipe.mixup_alpha, cutmix_alpha=recipe.cutmix_alpha,
        label_smoothing=smoothing, num_classes=num_classes,
    )

    def transform(images: Tensor, labels: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        targets = []
        with borrowed_generators():
            for seed, *group in zip(seeds, images.chunk(len(seeds)), labels.chunk(len(seeds)), strict=True):
                reseed(seed)
                targets.append(mixup(*group)[1])
        return images, torch.cat(targets)

    return transform
