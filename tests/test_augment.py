"""Augmentation: timm's, as a function of a seed, and the evaluation's pixels are PIL's."""

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
from timm.data.transforms import RandomResizedCropAndInterpolation

from pipeline import augment, config
from pipeline.config import ConfigError


@pytest.fixture(scope="module")
def experiment() -> config.Experiment:
    return config.load(Path(__file__).parent.parent / "params.yaml")


def recipe_with(experiment: config.Experiment, **changes: object) -> config.Recipe:
    return experiment.recipes["digits"].model_copy(update=changes)


@pytest.fixture
def photo() -> torch.Tensor:
    """(3, 60, 80) uint8, smooth."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def test_fold_is_the_same_on_every_machine():
    assert augment.fold(0, 1, 2) == 0x313424727fa68397
    assert len({augment.fold(0, epoch, place) for epoch in range(30) for place in range(30)}) == 900


@pytest.mark.parametrize("policy", [None, "3a", "rand-m9-mstd0.5-inc1", "augmix-m3", "original"])
def test_training_pixels_are_a_function_of_the_seed(experiment, photo, policy):
    recipe = recipe_with(experiment, auto_augment=policy, color_jitter=0.3, flop_prob=0.5)
    transform = pickle.loads(pickle.dumps(augment.train_transform(recipe, experiment.data)))

    def seen(seed: int) -> torch.Tensor:
        with augment.borrowed_generators():
            augment.reseed(augment.fold(seed))
            return transform(photo)

    assert seen(0).shape == (3, 32, 32) and seen(0).dtype == torch.uint8
    assert torch.equal(seen(0), seen(0))
    assert len({seen(seed).numpy().tobytes() for seed in range(10)}) == 10


@settings(deadline=None)
@given(
    height=st.integers(4, 60), width=st.integers(4, 60), seed=st.integers(0, 2**32),
    scale=st.sampled_from([(0.08, 1.0), (0.5, 0.5), (1.0, 1.0)]), ratio=st.sampled_from([(3 / 4, 4 / 3), (1.0, 1.0)]),
)
def test_crop_is_the_one_that_timm_draws(height, width, seed, scale, ratio):
    ours = augment.RandomResizedCrop(24, scale, ratio, interpolation="bicubic")
    timms = RandomResizedCropAndInterpolation(24, scale, ratio, interpolation="bicubic")
    places = np.stack(np.broadcast_arrays(*np.ogrid[:height, :width], 0), axis=-1).astype(np.uint8)
    with augment.borrowed_generators():
        augment.reseed(seed)
        mine = ours(torch.from_numpy(places).permute(2, 0, 1))
        mine_next = random.random()
        augment.reseed(seed)
        reference = np.asarray(timms(Image.fromarray(places)))
        assert random.random() == mine_next
    assert np.abs(mine.permute(1, 2, 0).numpy().astype(int) - reference).max() <= 1


def test_cropped_photos_have_pils_pixels():
    crop = augment.RandomResizedCrop(224, (0.08, 1.0), (3 / 4, 4 / 3), interpolation="bicubic")
    differences = []
    for photo in load_sample_images().images:
        for seed in range(8):
            image = torch.from_numpy(photo.copy()).permute(2, 0, 1)
            with augment.borrowed_generators():
                augment.reseed(seed)
                pixels = crop(image).permute(1, 2, 0).numpy().astype(int)
                augment.reseed(seed)
                top, left, height, width = crop.get_params(image, crop.scale, crop.ratio)
            part = Image.fromarray(photo[top : top + height, left : left + width])
            differences.append(np.abs(pixels - part.resize((224, 224), Image.Resampling.BICUBIC)))
    assert np.max(differences) <= 1
    assert np.mean(differences) < 0.01


@pytest.mark.parametrize("name", ["3a", "rand-m9-mstd0.5-inc1"])
def test_policies_change_what_they_change_in_timm(experiment, photo, name):
    recipe = recipe_with(experiment, auto_augment=name, color_jitter=0.3, flop_prob=0.0)
    policy = augment.train_transform(recipe, experiment.data).transforms[-1]
    for seed in range(20):
        with augment.borrowed_generators():
            augment.reseed(seed)
            changed = policy(photo)
            augment.reseed(seed)
            reference = policy.transform(Image.fromarray(photo.permute(1, 2, 0).contiguous().numpy()))
        assert np.array_equal(changed.permute(1, 2, 0).numpy(), reference)


def test_flop_mirrors_the_columns(experiment, photo):
    whole = {"random_crop_scale": (1.0, 1.0), "random_crop_ratio": (1.0, 1.0)}
    square = photo[:, :32, :32]
    mirrored = augment.train_transform(recipe_with(experiment, flop_prob=1.0, **whole), experiment.data)
    plain = augment.train_transform(recipe_with(experiment, flop_prob=0.0, **whole), experiment.data)
    assert torch.equal(plain(square), square)
    assert torch.equal(mirrored(square), square.flip(-1))


def test_unknown_policy_is_the_users_mistake(experiment):
    with pytest.raises(ConfigError, match="auto_augment: 'ra9' is none of timm's"):
        augment.train_transform(recipe_with(experiment, auto_augment="ra9"), experiment.data)


def test_test_crop_has_pils_pixels(experiment, photo):
    recipe = recipe_with(experiment, test_crop_ratio=0.8)
    pixels = augment.eval_transform(recipe, experiment.data)(photo).permute(1, 2, 0).numpy()
    reference = Image.fromarray(photo.permute(1, 2, 0).numpy()).resize((53, 40), Image.Resampling.BICUBIC)
    # (53 - 32) / 2 is rounded to even, as torchvision and timm do.
    reference = np.asarray(reference.crop((10, 4, 42, 36)))
    difference = np.abs(pixels.astype(int) - reference)
    assert difference.max() <= 1 and difference.mean() < 0.01


def test_normalise_has_mean_and_deviation_of_the_data(experiment):
    pixels = torch.randint(256, (4, 3, 5, 5), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    images = augment.Normalize(experiment.data)(pixels)
    assert images.is_contiguous()
    back = images.double() * torch.tensor(experiment.data.std).view(3, 1, 1)
    back += torch.tensor(experiment.data.mean).view(3, 1, 1)
    torch.testing.assert_close(back * 255, pixels.double(), atol=1e-4, rtol=0)


def test_erasing_follows_each_images_seed_and_spares_the_rest(experiment):
    erase = augment.Erase(recipe_with(experiment, random_erasing=0.5))
    seeds = [augment.fold(place) for place in range(40)]
    whole = erase(torch.zeros(40, 3, 32, 32), seeds)
    halves = torch.cat([erase(torch.zeros(20, 3, 32, 32), part) for part in (seeds[:20], seeds[20:])])
    assert torch.equal(whole, halves)
    erased = whole.flatten(1).ne(0).any(1).sum()
    assert 8 < erased < 32


def test_targets_are_smoothed(experiment):
    transform = augment.batch_transform(recipe_with(experiment, label_smoothing=0.1), num_classes=10)
    images, labels = torch.rand(3, 3, 4, 4), torch.tensor([1, 0, 9])
    same, targets = transform(images, labels, [0])
    assert same is images
    torch.testing.assert_close(targets[0], torch.full((10,), 0.01).index_fill(0, torch.tensor([1]), 0.91))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_groups_are_mixed_within_themselves_and_alike_at_any_world_size(experiment, mixup, cutmix):
    recipe = recipe_with(experiment, mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.0)
    transform = augment.batch_transform(recipe, num_classes=8)
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8)
    mixed, targets = transform(images.clone(), labels, [7, 9])
    parts = [transform(images[part].clone(), labels[part], [seed]) for part, seed in ((slice(4), 7), (slice(4, 8), 9))]
    assert torch.equal(mixed, torch.cat([part[0] for part in parts]))
    assert torch.equal(targets, torch.cat([part[1] for part in parts]))
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    for place, target in enumerate(targets):
        first = place // 4 * 4
        assert set(target.nonzero().flatten().tolist()) == {place, first + 3 - (place - first)}
    assert not torch.equal(mixed, transform(images.clone(), labels, [8, 9])[0])
