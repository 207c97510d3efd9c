"""Augmentation is timm's, a function of a seed, and the test crop matches PIL."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from pipeline.base import config, schema
from pipeline.base.errors import ConfigError
from pipeline.loading import augment


@pytest.fixture(scope="module")
def experiment() -> config.Experiment:
    return config.load_experiment(Path(__file__).resolve().parents[2] / "params.yaml")


def recipe_with(experiment: config.Experiment, **changes: object) -> schema.Recipe:
    return experiment.recipes["digits"].model_copy(update=changes)


@pytest.fixture
def photo() -> torch.Tensor:
    """(3, 60, 80) uint8, smooth."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def test_derived_seeds_are_the_same_on_every_machine():
    assert augment.derive_seed(0, 1, 2) == 0x313424727FA68397
    assert len({augment.derive_seed(0, epoch, position) for epoch in range(30) for position in range(30)}) == 900


@pytest.mark.parametrize("policy", [None, "3a", "rand-m9-mstd0.5-inc1", "augmix-m3", "original"])
def test_training_pixels_are_a_function_of_the_seed(experiment, photo, policy):
    recipe = recipe_with(experiment, auto_augment=policy, color_jitter=0.3, flop_prob=0.5)
    transform = pickle.loads(pickle.dumps(augment.build_train_transform(recipe, experiment.data)))

    def augmented(seed: int) -> torch.Tensor:
        with augment.preserve_rng_state():
            augment.seed_generators(augment.derive_seed(seed))
            return transform(photo)

    assert augmented(0).shape == (3, 32, 32) and augmented(0).dtype == torch.uint8
    assert torch.equal(augmented(0), augmented(0))
    assert len({augmented(seed).numpy().tobytes() for seed in range(10)}) == 10


@settings(deadline=None)
@given(
    height=st.integers(4, 60),
    width=st.integers(4, 60),
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([(0.08, 1.0), (0.5, 0.5), (1.0, 1.0)]),
    ratio=st.sampled_from([(3 / 4, 4 / 3), (1.0, 1.0)]),
)
def test_random_crops_match_timm(height, width, seed, scale, ratio):
    ours = augment.RandomResizedCrop(24, scale, ratio, interpolation="bicubic")
    timms = RandomResizedCropAndInterpolation(24, scale, ratio, interpolation="bicubic")
    coordinates = np.stack(np.broadcast_arrays(*np.ogrid[:height, :width], 0), axis=-1).astype(np.uint8)
    with augment.preserve_rng_state():
        augment.seed_generators(seed)
        cropped = ours(torch.from_numpy(coordinates).permute(2, 0, 1))
        next_draw = random.random()
        augment.seed_generators(seed)
        reference = np.asarray(timms(Image.fromarray(coordinates)))
        assert random.random() == next_draw
    assert np.abs(cropped.permute(1, 2, 0).numpy().astype(int) - reference).max() <= 1


def test_cropped_photos_match_pil():
    crop = augment.RandomResizedCrop(224, (0.08, 1.0), (3 / 4, 4 / 3), interpolation="bicubic")
    differences = []
    for photo in load_sample_images().images:
        for seed in range(8):
            image = torch.from_numpy(photo.copy()).permute(2, 0, 1)
            with augment.preserve_rng_state():
                augment.seed_generators(seed)
                pixels = crop(image).permute(1, 2, 0).numpy().astype(int)
                augment.seed_generators(seed)
                top, left, height, width = crop.get_params(image, crop.scale, crop.ratio)
            part = Image.fromarray(photo[top : top + height, left : left + width])
            differences.append(np.abs(pixels - part.resize((224, 224), Image.Resampling.BICUBIC)))
    assert np.max(differences) <= 1
    assert np.mean(differences) < 0.01


@pytest.mark.parametrize("name", ["3a", "rand-m9-mstd0.5-inc1"])
def test_policies_match_timm(experiment, photo, name):
    recipe = recipe_with(experiment, auto_augment=name, color_jitter=0.3, flop_prob=0.0)
    policy = augment.build_train_transform(recipe, experiment.data).transforms[-1]
    for seed in range(20):
        with augment.preserve_rng_state():
            augment.seed_generators(seed)
            changed = policy(photo)
            augment.seed_generators(seed)
            reference = policy.transform(Image.fromarray(photo.permute(1, 2, 0).contiguous().numpy()))
        assert np.array_equal(changed.permute(1, 2, 0).numpy(), reference)


def test_flop_mirrors_the_columns(experiment, photo):
    whole = {"random_crop_scale": (1.0, 1.0), "random_crop_ratio": (1.0, 1.0)}
    square = photo[:, :32, :32]
    mirrored = augment.build_train_transform(recipe_with(experiment, flop_prob=1.0, **whole), experiment.data)
    plain = augment.build_train_transform(recipe_with(experiment, flop_prob=0.0, **whole), experiment.data)
    assert torch.equal(plain(square), square)
    assert torch.equal(mirrored(square), square.flip(-1))


def test_unknown_policy_raises_config_error(experiment):
    with pytest.raises(ConfigError, match="auto_augment: timm has no policy 'ra9'"):
        augment.build_train_transform(recipe_with(experiment, auto_augment="ra9"), experiment.data)


def test_the_test_crop_matches_pil(experiment, photo):
    recipe = recipe_with(experiment, test_crop_ratio=0.8)
    pixels = augment.build_eval_transform(recipe, experiment.data)(photo).permute(1, 2, 0).numpy()
    reference = Image.fromarray(photo.permute(1, 2, 0).numpy()).resize((53, 40), Image.Resampling.BICUBIC)
    # (53 - 32) / 2 is rounded to even, as torchvision and timm do.
    reference = np.asarray(reference.crop((10, 4, 42, 36)))
    difference = np.abs(pixels.astype(int) - reference)
    assert difference.max() <= 1 and difference.mean() < 0.01


def test_normalize_uses_mean_and_std_of_the_data(experiment):
    pixels = torch.randint(256, (4, 3, 5, 5), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    images = augment.Normalize(experiment.data)(pixels)
    assert images.is_contiguous()
    back = images.double() * torch.tensor(experiment.data.std).view(3, 1, 1)
    back += torch.tensor(experiment.data.mean).view(3, 1, 1)
    torch.testing.assert_close(back * 255, pixels.double(), atol=1e-4, rtol=0)


def test_erasing_depends_on_the_seed_of_each_image_only(experiment):
    sample = augment.RandomErasingSampler(recipe_with(experiment, random_erasing=0.5), image_size=32)

    def erase(seeds: list[int]) -> torch.Tensor:
        return augment.erase_patches(torch.zeros(len(seeds), 3, 32, 32), sample(seeds))

    seeds = [augment.derive_seed(position) for position in range(40)]
    whole = erase(seeds)
    assert torch.equal(whole, torch.cat([erase(seeds[:20]), erase(seeds[20:])]))
    erased = whole.flatten(1).ne(0).any(1).sum()
    assert 8 < erased < 32


def test_erased_pixels_are_those_of_timm(experiment):
    seeds = [augment.derive_seed(position) for position in range(20)]
    patches = augment.RandomErasingSampler(recipe_with(experiment, random_erasing=0.5), image_size=32)(seeds)
    found = augment.erase_patches(torch.zeros(20, 3, 32, 32), pickle.loads(pickle.dumps(patches)))
    timms, expected = RandomErasing(0.5, mode="pixel", device="cpu"), torch.zeros(20, 3, 32, 32)
    with augment.preserve_rng_state():
        for image, seed in zip(expected, seeds, strict=True):
            augment.seed_generators(seed)
            timms(image)
    assert torch.equal(found, expected) and expected.any()


def test_targets_are_smoothed(experiment):
    transform = augment.build_mixup(recipe_with(experiment, label_smoothing=0.1), num_classes=10)
    images, labels = torch.rand(3, 3, 4, 4), torch.tensor([1, 0, 9])
    same, targets = transform(images, labels, [0])
    assert same is images
    torch.testing.assert_close(targets[0], torch.full((10,), 0.01).index_fill(0, torch.tensor([1]), 0.91))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixup_stays_within_groups_at_any_world_size(experiment, mixup, cutmix):
    recipe = recipe_with(experiment, mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.0)
    transform = augment.build_mixup(recipe, num_classes=8)
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8)
    mixed, targets = transform(images.clone(), labels, [7, 9])
    parts = [transform(images[part].clone(), labels[part], [seed]) for part, seed in ((slice(4), 7), (slice(4, 8), 9))]
    assert torch.equal(mixed, torch.cat([part[0] for part in parts]))
    assert torch.equal(targets, torch.cat([part[1] for part in parts]))
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    for position, target in enumerate(targets):
        first = position // 4 * 4
        assert set(target.nonzero().flatten().tolist()) == {position, first + 3 - (position - first)}
    assert not torch.equal(mixed, transform(images.clone(), labels, [8, 9])[0])
