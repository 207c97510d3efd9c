"""Shards of 26 training and 11 validation images, and their batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.base import config, schema
from pipeline.loading import batching
from pipeline.loading.batching import Batch
from pipeline.loading.datasets import IndexedImages
from pipeline.packing import pack

NUM_TRAIN, NUM_VAL, BATCH, GROUP = 26, 11, 8, 2


FIELDS = ("images", "labels", "rows")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 training and 11 validation images of three classes and differing sizes."""
    base = tmp_path_factory.mktemp("source")
    generator = np.random.default_rng(0)
    for split, num in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        for number in range(num):
            height, width = generator.integers(30, 60, 2)
            coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            path = base / split / f"class{number % 3}" / f"{number:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(path, quality=90)
    return base


def write(source: Path, out: Path) -> Path:
    pack.pack_source(str(source), out, images_per_shard=7, seed=0)
    return out


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of the source, which no test changes."""
    return write(source, tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture
def altered(source: Path, tmp_path: Path) -> Path:
    """The shards of the source, which the test may change."""
    return write(source, tmp_path / "shards")


@pytest.fixture(scope="module")
def experiment() -> config.Experiment:
    return config.load_experiment(Path(__file__).resolve().parents[2] / "params.yaml")


@pytest.fixture(scope="module")
def recipe(experiment: config.Experiment) -> schema.Recipe:
    """A recipe with all random augmentations."""
    return experiment.recipes["digits"].model_copy(
        update={
            "global_batch_size": BATCH,
            "random_crop_scale": (0.1, 1.0),
            "flop_prob": 0.5,
            "color_jitter": 0.3,
            "auto_augment": "rand-m9-mstd0.5-inc1",
            "random_erasing": 0.5,
            "mixup_group": GROUP,
        }
    )


@pytest.fixture(scope="module")
def train(folder: Path, experiment: config.Experiment, recipe: schema.Recipe):
    """train_batches with fixed data, recipe and seed."""
    images = IndexedImages(folder, "train")

    def batches(epoch: int = 0, num_repeats: int = 1, **division: int) -> list[Batch]:
        repeated = recipe.model_copy(update={"repeated_augmentation": num_repeats})
        return list(batching.train_batches(images, repeated, experiment.data, seed=0, epoch=epoch, **division))

    return batches


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.seeds == b.seeds
        assert all(torch.equal(getattr(a, field), getattr(b, field)) for field in FIELDS)
