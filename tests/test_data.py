"""Reading shards: any order, every image once, and the same pixels however the work is divided."""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import config, data, shard
from pipeline.data import Batch, IndexedImages, ShardError

NUM_TRAIN, NUM_VAL, BATCH = 26, 11, 8
FIELDS = ("images", "labels", "rows")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 26 training and 11 validation images of three classes and differing sizes."""
    base = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, num in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        for number in range(num):
            height, width = generator.integers(30, 60, 2)
            coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            path = base / "source" / split / f"class{number % 3}" / f"{number:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(path, quality=90)
    shard.write_shards(base / "source", base / "shards", images_per_shard=7, seed=0)
    return base / "shards"


@pytest.fixture(scope="module")
def experiment() -> config.Experiment:
    return config.load(Path(__file__).parent.parent / "params.yaml")


@pytest.fixture(scope="module")
def recipe(experiment: config.Experiment) -> config.Recipe:
    """All that is random at once."""
    return experiment.recipes["digits"].model_copy(update={
        "global_batch_size": BATCH, "random_crop_scale": (0.1, 1.0), "flop_prob": 0.5, "color_jitter": 0.3,
        "auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.5,
    })


@pytest.fixture
def train(folder: Path, experiment: config.Experiment, recipe: config.Recipe):
    """train_batches with all but the division of the work given."""
    images = IndexedImages(folder, "train")

    def batches(epoch: int = 0, **division: int) -> list[Batch]:
        return list(data.train_batches(images, recipe, experiment.data, seed=0, epoch=epoch, **division))

    return batches


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.seed == b.seed
        assert all(torch.equal(getattr(a, field), getattr(b, field)) for field in FIELDS)


def joined(parts: Iterator[Batch]) -> Batch:
    parts = list(parts)
    return Batch(*(torch.cat([getattr(part, field) for part in parts]) for field in FIELDS), parts[0].seed)


def test_epoch_order_is_a_permutation_of_its_seed_and_epoch():
    order = data.epoch_order(1000, seed=3, epoch=5)
    assert torch.equal(order.sort().values, torch.arange(1000))
    torch.rand(7)
    assert torch.equal(order, data.epoch_order(1000, seed=3, epoch=5))
    assert not torch.equal(order, data.epoch_order(1000, seed=3, epoch=6))
    assert not torch.equal(order, data.epoch_order(1000, seed=4, epoch=5))


def test_batches_are_normalised_floats_of_the_epochs_order(train):
    batches = train()
    assert len(batches) == NUM_TRAIN // BATCH
    assert batches[0].images.shape == (BATCH, 3, 32, 32)
    assert batches[0].images.dtype == torch.float32 and batches[0].labels.dtype == torch.int64
    rows = torch.cat([batch.rows for batch in batches])
    assert torch.equal(rows, data.epoch_order(NUM_TRAIN, seed=0, epoch=0)[: len(rows)])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_the_pixels_that_one_would(train, world_size):
    ranks = [train(rank=rank, world_size=world_size) for rank in range(world_size)]
    assert_same(train(), [joined(parts) for parts in zip(*ranks, strict=True)])


def test_resumed_epoch_goes_on_with_the_same_pixels(train):
    assert_same(train(start_step=1), train()[1:])


def test_loader_processes_change_no_pixel(train):
    assert_same(train(), train(loader_workers=2))


def test_epochs_and_images_are_augmented_differently(train):
    first, second = train(epoch=0), train(epoch=1)
    place = {int(row): image for batch in second for row, image in zip(batch.rows, batch.images, strict=True)}
    again = [(image, place[int(row)]) for batch in first
             for row, image in zip(batch.rows, batch.images, strict=True) if int(row) in place]
    assert len(again) > 10
    assert not any(torch.equal(before, after) for before, after in again)


def test_reading_leaves_the_global_generators_alone(train):
    def draws() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()

    def seed() -> None:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seed()
    expected = draws()
    seed()
    train()
    assert draws() == expected


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 16])
def test_every_validation_image_comes_exactly_once(folder, experiment, recipe, world_size):
    images = IndexedImages(folder, "val")
    batches = [batch for rank in range(world_size) for batch in data.val_batches(
        images, recipe, experiment.data, batch_size=4, rank=rank, world_size=world_size)]
    assert torch.cat([batch.rows for batch in batches]).tolist() == list(range(NUM_VAL))
    assert torch.equal(torch.cat([batch.labels for batch in batches]), images.labels)
    assert max(len(batch.images) for batch in batches) <= 4


def test_decoded_pixels_are_pils(folder):
    images = IndexedImages(folder, "train")
    for row in range(len(images)):
        pixels, label = images[row]
        reference = np.asarray(Image.open(io.BytesIO(images.jpeg(row))).convert("RGB"))
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), reference)
        assert images.keys([row])[0].startswith(f"train/class{label}/")


def test_open_images_can_be_sent_to_another_process(folder):
    images = IndexedImages(folder, "train")
    before = images[3][0]
    assert torch.equal(pickle.loads(pickle.dumps(images))[3][0], before)


def test_batches_that_cannot_be_are_refused(folder, experiment, recipe):
    images = IndexedImages(folder, "train")
    with pytest.raises(ValueError, match="8 does not divide among 3 workers"):
        next(data.train_batches(images, recipe, experiment.data, seed=0, epoch=0, world_size=3))
    large = recipe.model_copy(update={"global_batch_size": 64})
    with pytest.raises(ValueError, match="a global batch of 64 needs more than the 26 training images"):
        next(data.train_batches(images, large, experiment.data, seed=0, epoch=0))


def test_a_jpeg_that_does_not_decode_is_named(folder):
    images = IndexedImages(folder, "train")
    images._offset = images._offset + 1
    with pytest.raises(ShardError, match=r"train/class\d/\d\d in .*train-000000.tar does not decode"):
        images[0]
