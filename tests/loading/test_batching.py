"""Loading: any order, every image once, and the same pixels however the work is divided."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.loading import batching
from pipeline.loading.batching import Batch
from pipeline.loading.datasets import IndexedImages
from pipeline.loading.loader import BatchDecoder, BatchRequest, Loader
from pipeline.shards.manifests import Shards
from tests.loading.conftest import BATCH, FIELDS, GROUP, NUM_TRAIN, NUM_VAL, assert_same


def join_batches(parts: Iterable[Batch]) -> Batch:
    parts = list(parts)
    seeds = tuple(seed for part in parts for seed in part.seeds)
    return Batch(*(torch.cat([getattr(part, field) for part in parts]) for field in FIELDS), seeds)


def join_microbatches(batches: Iterable[Batch]) -> list[Batch]:
    """Joins the microbatches of one rank to its parts of the global batches."""
    whole_steps, pieces = [], []
    for batch in batches:
        pieces.append(batch)
        if batch.ends_step:
            whole_steps.append(join_batches(pieces))
            pieces = []
    assert not pieces
    return whole_steps


def test_epoch_order_is_a_permutation_of_its_seed_and_epoch():
    order = batching.epoch_order(1000, seed=3, epoch=5)
    assert torch.equal(order.sort().values, torch.arange(1000))
    torch.rand(7)
    assert torch.equal(order, batching.epoch_order(1000, seed=3, epoch=5))
    assert not torch.equal(order, batching.epoch_order(1000, seed=3, epoch=6))
    assert not torch.equal(order, batching.epoch_order(1000, seed=4, epoch=5))


def test_batches_are_normalized_floats_in_the_order_of_the_epoch(train):
    batches = train()
    assert len(batches) == NUM_TRAIN // BATCH
    assert batches[0].images.shape == (BATCH, 3, 32, 32)
    assert batches[0].images.dtype == torch.float32 and batches[0].labels.dtype == torch.int64
    rows = torch.cat([batch.rows for batch in batches])
    assert torch.equal(rows, batching.epoch_order(NUM_TRAIN, seed=0, epoch=0)[: len(rows)])


@given(num=st.integers(1, 400), num_repeats=st.integers(2, 4), size=st.integers(1, 60), seed=st.integers(0, 5))
def test_repeats_of_an_image_are_in_one_batch_far_enough_apart_for_other_ranks(num, num_repeats, size, seed):
    once = batching.epoch_order(num, seed=seed, epoch=1).repeat_interleave(num_repeats)[:num]
    order = batching.epoch_order(num, seed=seed, epoch=1, num_repeats=num_repeats, global_batch_size=size)
    assert len(order) == num
    for start in range(0, num, size):
        batch = order[start : start + size]
        assert torch.equal(batch.sort().values, once[start : start + size].sort().values)
        if len(batch) == size:
            last_seen: dict[int, int] = {}
            for position, row in enumerate(batch.tolist()):
                assert position - last_seen.get(row, -size) >= size // num_repeats
                last_seen[row] = position


def test_repeats_of_an_image_are_augmented_differently(train):
    batch = train(num_repeats=3)[0]
    first, second = (int(position) for position in (batch.rows == batch.rows[0]).nonzero()[:2])
    assert not torch.equal(batch.images[first], batch.images[second])


@st.composite
def divisions(draw: Callable) -> dict[str, int]:
    """How a global batch of four groups is divided, where to start, and who decodes."""
    return {
        "world_size": draw(st.integers(1, BATCH // GROUP)),
        "batch_size": GROUP * draw(st.integers(1, 5)),
        "start_step": draw(st.integers(0, NUM_TRAIN // BATCH)),
        "loader_workers": draw(st.sampled_from([0, 0, 1, 3])),
    }


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than there are cores
@settings(max_examples=20, deadline=None)
@given(division=divisions(), epoch=st.integers(0, 2), num_repeats=st.integers(1, 3))
def test_pixels_and_steps_do_not_depend_on_world_size_resume_point_or_loader_processes(
    train, division, epoch, num_repeats
):
    ranks = [train(epoch, num_repeats, rank=rank, **division) for rank in range(division["world_size"])]
    assert all(len(batch.images) <= division["batch_size"] for batches in ranks for batch in batches)
    parts = [join_microbatches(batches) for batches in ranks]
    assert {len(batches) for batches in parts} == {NUM_TRAIN // BATCH - division["start_step"]}
    batches = [join_batches(step_parts) for step_parts in zip(*parts, strict=True)]
    expected = train(epoch, num_repeats)[division["start_step"] :]
    if expected:
        assert_same(expected, batches)


def test_epochs_and_images_are_augmented_differently(train):
    first, second = train(epoch=0), train(epoch=1)
    image_of_row = {int(row): image for batch in second for row, image in zip(batch.rows, batch.images, strict=True)}
    again = [
        (image, image_of_row[int(row)])
        for batch in first
        for row, image in zip(batch.rows, batch.images, strict=True)
        if int(row) in image_of_row
    ]
    assert len(again) > 10
    assert not any(torch.equal(before, after) for before, after in again)


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_reading_leaves_the_global_generators_alone(train, loader_workers):
    def draws() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()

    def seed() -> None:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seed()
    expected = draws()
    seed()
    train(loader_workers=loader_workers)
    assert draws() == expected


def test_loader_processes_have_one_thread(folder):
    images = IndexedImages(folder, "train")
    count_threads = lambda image: torch.full((3, 1, 1), torch.get_num_threads())  # noqa: E731
    decoding = Loader({"train": BatchDecoder(images, count_threads)}, workers=1)
    [decoded] = decoding.load([BatchRequest("train", range(4), list(range(4)), seed=0)])
    decoding.close()
    assert decoded.pixels.unique().tolist() == [1]


def test_loader_processes_live_over_epochs_and_splits_and_open_each_shard_once(folder, experiment, recipe, tmp_path):
    """Batches of all epochs, and of validation in between, come from the same processes, as they are without any."""
    log = tmp_path / "log"

    class LoggedImages(IndexedImages):
        def read_jpegs(self, rows):
            contents = super().read_jpegs(rows)
            with log.open("a") as file:
                file.write(f"{os.getpid()} {len(self.shards.store._files)}\n")
            return contents

    shards = Shards(folder)
    images = {split: LoggedImages(shards, split) for split in ("train", "val")}

    def take(loader: batching.BatchLoader) -> list[list[Batch]]:
        epochs = [list(loader.train_batches(seed=0, epoch=0)), list(loader.val_batches())]
        abandoned = loader.train_batches(seed=0, epoch=1)
        next(abandoned)  # a training may stop within an epoch
        return [*epochs, list(loader.val_batches()), list(loader.train_batches(seed=0, epoch=1, start_step=1))]

    found = {}
    for loader_workers in (0, 2):
        settings = {"batch_size": BATCH, "loader_workers": loader_workers}
        with batching.BatchLoader(images, recipe, experiment.data, **settings) as loader:
            log.write_text("")
            found[loader_workers] = take(loader)
        lines = [line.split() for line in log.read_text().splitlines()]
        processes = {process for process, _ in lines}
        assert len(processes) == max(1, loader_workers)
        assert max(int(num_open) for _, num_open in lines) == len(list(folder.glob("*.tar")))
    assert str(os.getpid()) not in processes
    assert not multiprocessing.active_children()
    for expected, batches in zip(*found.values(), strict=True):
        assert_same(expected, batches)


@settings(max_examples=20, deadline=None)
@given(world_size=st.integers(1, 16), batch_size=st.integers(1, 12), loader_workers=st.sampled_from([0, 0, 0, 2]))
def test_every_validation_image_comes_exactly_once(folder, experiment, recipe, world_size, batch_size, loader_workers):
    images = IndexedImages(folder, "val")
    batches = [
        batch
        for rank in range(world_size)
        for batch in batching.val_batches(
            images,
            recipe,
            experiment.data,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            loader_workers=loader_workers,
        )
    ]
    assert torch.cat([batch.rows for batch in batches]).tolist() == list(range(NUM_VAL))
    assert torch.equal(torch.cat([batch.labels for batch in batches]), images.labels)
    assert max(len(batch.images) for batch in batches) <= batch_size


def test_impossible_batch_sizes_are_refused(folder, experiment, recipe):
    images = IndexedImages(folder, "train")

    def batches(*, num_repeats: int = 1, size: int = BATCH, **division: int) -> Iterator[Batch]:
        changed = recipe.model_copy(update={"global_batch_size": size, "repeated_augmentation": num_repeats})
        return batching.train_batches(images, changed, experiment.data, seed=0, epoch=0, **division)

    with pytest.raises(ValueError, match="of 4 groups does not divide among 5 workers"):
        next(batches(world_size=5))
    with pytest.raises(ValueError, match="of 8 and 3 images do not consist of whole groups of 2"):
        next(batches(batch_size=3))
    with pytest.raises(ValueError, match="a global batch of 64 needs more than the 26 training images"):
        next(batches(size=64))
    with pytest.raises(
        ValueError, match="groups of 2 images in a global batch of 8 would contain several of 5 repeats"
    ):
        next(batches(num_repeats=5))
