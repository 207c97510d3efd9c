"""Loading: any order, every image once, and the same pixels however the work is divided."""

from __future__ import annotations

import io
import json
import pickle
import random
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_loader
from timm.data.distributed_sampler import OrderedDistributedSampler, RepeatAugSampler
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, Sampler

from pipeline.base import config, schema
from pipeline.base.errors import ShardError
from pipeline.loading import augment, batching
from pipeline.loading.batching import Batch
from pipeline.loading.datasets import IndexedImages
from pipeline.packing import pack
from pipeline.shards.manifests import Shards

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


def joined(parts: Iterable[Batch]) -> Batch:
    parts = list(parts)
    seeds = tuple(seed for part in parts for seed in part.seeds)
    return Batch(*(torch.cat([getattr(part, field) for part in parts]) for field in FIELDS), seeds)


def steps(batches: Iterable[Batch]) -> list[Batch]:
    """Joins the microbatches of one rank to its parts of the global batches."""
    found, pieces = [], []
    for batch in batches:
        pieces.append(batch)
        if batch.ends_step:
            found.append(joined(pieces))
            pieces = []
    assert not pieces
    return found


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
    parts = [steps(batches) for batches in ranks]
    assert {len(batches) for batches in parts} == {NUM_TRAIN // BATCH - division["start_step"]}
    found = [joined(of_step) for of_step in zip(*parts, strict=True)]
    expected = train(epoch, num_repeats)[division["start_step"] :]
    assert_same(expected, found) if expected else None


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
    fetch = batching.BatchDataset(images, count_threads, torch.arange(4), seed=0)
    ((pixels, _),) = batching._iterate_loader(fetch, [range(4)], 1, "cpu")
    assert pixels.unique().tolist() == [1]


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


SAMPLERS: dict[str, Callable[[IndexedImages], Sampler]] = {
    "torch's random": RandomSampler,
    "torch's distributed": lambda images: DistributedSampler(images, num_replicas=2, rank=1),
    "timm's ordered": lambda images: OrderedDistributedSampler(images, num_replicas=2, rank=1),
    "timm's repeated": lambda images: RepeatAugSampler(
        images, num_replicas=2, rank=1, selected_round=0, selected_ratio=1
    ),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("loader_workers", [0, 2])
def test_samplers_and_loaders_of_torch_and_timm_read_the_images(folder, experiment, recipe, sampler, loader_workers):
    images = IndexedImages(folder, "train", augment.build_eval_transform(recipe, experiment.data))
    torch.manual_seed(3)
    rows = list(SAMPLERS[sampler](images))
    torch.manual_seed(3)
    loader = DataLoader(images, 4, sampler=SAMPLERS[sampler](images), num_workers=loader_workers)
    pixels, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert len(rows) >= NUM_TRAIN // 2
    if sampler != "torch's random":  # a loader draws a seed for itself first
        assert torch.equal(labels, images.labels[rows])
        assert torch.equal(pixels, torch.stack([images[row][0] for row in rows]))
    assert pixels.dtype == torch.uint8 and pixels.shape[1:] == (3, 32, 32)


def test_timms_loader_takes_the_images_with_its_own_transforms(folder):
    images = IndexedImages(folder, "train")
    loader = create_loader(
        images,
        (3, 32, 32),
        4,
        is_training=True,
        auto_augment=None,
        color_jitter=0.0,
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    batches = [inputs for inputs, _ in loader]
    assert len(batches) == NUM_TRAIN // 4
    assert all(inputs.shape == (4, 3, 32, 32) and inputs.isfinite().all() for inputs in batches)


def test_decoded_pixels_match_pil(folder):
    images = IndexedImages(folder, "train")
    (jpeg,) = images.read_jpegs([4])
    pixels, label = images[4]
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")))
    assert images.keys([4])[0].startswith(f"train/class{label}/")


def test_open_images_can_be_sent_to_another_process(folder):
    images = IndexedImages(folder, "train")
    before = images[3][0]
    assert torch.equal(pickle.loads(pickle.dumps(images))[3][0], before)


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


def row_of_first(images: IndexedImages, name: str) -> int:
    """The row of the first image in that tar."""
    return next(row for row in range(len(images)) if images._names[images._shard[row]] == name)


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_a_swapped_shard_is_named_with_what_the_index_expects(altered, experiment, recipe, loader_workers):
    images = IndexedImages(altered, "val")
    first, second = altered / "val-000000.tar", altered / "val-000001.tar"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    expected = r"^\S*val-000000.tar: the index expects val/class0/00 of \d+ bytes at byte 512, found val/class\d/\d\d"
    with pytest.raises(ShardError, match=expected):
        next(batching.val_batches(images, recipe, experiment.data, batch_size=4, loader_workers=loader_workers))


def test_a_shard_cut_after_it_was_opened_is_named(altered):
    images = IndexedImages(altered, "train")
    path = altered / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:700])
    row = row_of_first(images, path.name)
    with pytest.raises(
        ShardError, match=r"train-000001.tar is truncated: expected \d+ bytes from byte 0 on, found 700"
    ):
        images[row]


def test_another_size_or_no_header_is_not_what_the_index_expects(altered):
    images = IndexedImages(altered, "train")
    images._offset = images._offset + 1
    with pytest.raises(ShardError, match=r"expects train/class\d/\d\d of .* found no header of a tar member"):
        images[0]
    images = IndexedImages(altered, "train")
    images._size = images._size - 1
    with pytest.raises(ShardError, match=r"expects (train/class\d/\d\d) of .* found \1.jpg of"):
        images[0]


def test_a_jpeg_that_cannot_be_decoded_is_named(altered):
    path = altered / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[512:1000] = bytes(488)
    path.write_bytes(content)
    images = IndexedImages(altered, "train")
    with pytest.raises(ShardError, match=r"train-000000.tar: train/class\d/\d\d cannot be decoded \(not an image\)"):
        images[row_of_first(images, path.name)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("key", ["train/a/b", "train/Hütte/1", "train/" + "long" * 16 + "/" + "name" * 15])
def test_headers_of_all_of_pythons_tars_name_their_images(folder, tmp_path, form, key):
    (jpeg,) = IndexedImages(folder, "train").read_jpegs([0])
    with tarfile.open(tmp_path / "train-000000.tar", "w", format=form, encoding="utf-8") as tar:
        member = tarfile.TarInfo(f"{key}.JPEG")
        member.size = len(jpeg)
        tar.addfile(member, io.BytesIO(jpeg))
    offset = (tmp_path / "train-000000.tar").read_bytes().index(jpeg)

    def first(own_key: str) -> bytes:
        row = {"key": own_key, "shard": "train-000000.tar", "offset": offset, "size": len(jpeg), "label": 0}
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train.index.parquet")
        manifest = {
            "shards": {path.name: {"size": path.stat().st_size, "xxh3": ""} for path in tmp_path.glob("*.tar")},
            "location": None,
            "indices": {},
            "classes": ["one"],
            "counts": {"train": 1},
        }
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        return IndexedImages(tmp_path, "train").read_jpegs([0])[0]

    assert first(key) == jpeg
    with pytest.raises(ShardError, match="the index expects other"):
        first(f"other{key}")


def test_content_hash_ignores_location_but_not_images(altered, folder, source, tmp_path):
    manifest = json.loads((altered / "manifest.json").read_text())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in altered.glob("*.tar"):
        path.rename(elsewhere / path.name)
    for location in ("../elsewhere", str(elsewhere)):
        (altered / "manifest.json").write_text(json.dumps(manifest | {"location": location, "source": "another"}))
        assert torch.equal(IndexedImages(altered, "val")[5][0], IndexedImages(folder, "val")[5][0])
        assert Shards(altered).fingerprint == Shards(folder).fingerprint
    manifest |= {"location": str(elsewhere), "classes": ["x", "y", "z"]}
    (altered / "manifest.json").write_text(json.dumps(manifest))
    assert Shards(altered).fingerprint != Shards(folder).fingerprint
    (elsewhere / "val-000000.tar").unlink()
    with pytest.raises(ShardError, match="elsewhere/val-000000.tar is in the manifest but missing"):
        Shards(altered)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("cache_gib", [0, 1])
def test_shards_at_a_url_give_the_same_pixels_in_loader_processes(
    altered, folder, experiment, recipe, tmp_path, monkeypatch, cache_gib
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    manifest = json.loads((altered / "manifest.json").read_text())
    (tmp_path / "bucket").mkdir()
    for path in altered.glob("*.tar"):
        path.rename(tmp_path / "bucket" / path.name)
    (altered / "manifest.json").write_text(json.dumps(manifest | {"location": f"file://{tmp_path}/bucket"}))

    def batches(shards: Shards, loader_workers: int) -> list[Batch]:
        images = IndexedImages(shards, "train")
        settings = {"seed": 0, "epoch": 0, "loader_workers": loader_workers}
        return list(batching.train_batches(images, recipe, experiment.data, **settings))

    remote = Shards(altered, cache_gib=cache_gib)
    assert_same(batches(Shards(folder), 0), batches(remote, 0))
    assert_same(batches(Shards(folder), 0), batches(remote, 2))
