"""The images of a split: readable by loaders of torch and timm, and checked against their index."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import tempfile
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from timm.data import create_loader
from timm.data.distributed_sampler import OrderedDistributedSampler, RepeatAugSampler
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, Sampler

from pipeline.base.errors import ShardError
from pipeline.loading import augment, batching
from pipeline.loading.batching import Batch
from pipeline.loading.datasets import IndexedImages, stratified_rows
from pipeline.shards.manifests import Shards
from tests.loading.conftest import NUM_TRAIN, assert_same

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


def test_stratified_subsets_are_balanced_nested_and_made_by_their_seed():
    labels = torch.arange(1000) % 10
    subsets = [set(stratified_rows(labels, count, seed=3).tolist()) for count in (7, 50, 333, 1000)]
    assert [len(subset) for subset in subsets] == [7, 50, 333, 1000]
    assert subsets[0] < subsets[1] < subsets[2] < subsets[3]
    for subset in subsets:
        counts = labels[list(subset)].bincount(minlength=10)
        assert counts.max() - counts.min() <= 1
    rows = stratified_rows(labels, 50, seed=3)
    assert torch.equal(rows, stratified_rows(labels, 50, seed=3)) and torch.equal(rows, rows.sort().values)
    assert set(stratified_rows(labels, 50, seed=4).tolist()) != subsets[1]
    rare = torch.cat([torch.zeros(900, dtype=torch.int64), torch.ones(100, dtype=torch.int64)])
    assert rare[stratified_rows(rare, 100, seed=0)].sum() == pytest.approx(10, abs=1)
    with pytest.raises(ValueError, match="1000 images, too few"):
        stratified_rows(labels, 1001, seed=3)


def test_selected_rows_are_those_images(folder):
    images = IndexedImages(folder, "train")
    selected = images.select(torch.tensor([5, 2]))
    assert len(selected) == 2 and selected.keys([0, 1]) == images.keys([5, 2])
    assert selected.labels.tolist() == images.labels[[5, 2]].tolist()
    assert torch.equal(selected[1][0], images[2][0]) and len(images) == NUM_TRAIN
