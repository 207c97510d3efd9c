"""Existing shards are indexed in place and in their order, and invalid samples are named."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import fsspec
import pytest
import webdataset

from pipeline.base import progress
from pipeline.base.errors import ShardError
from pipeline.loading.datasets import IndexedImages
from pipeline.packing import pack, tar_scan
from pipeline.packing.indexing import index_shards
from pipeline.packing.tar_scan import scan_tar
from pipeline.shards import manifests, verify
from pipeline.shards.manifests import Shards
from pipeline.shards.store import Store
from tests.packing import layouts
from tests.packing.conftest import FIRST_SHARD

_LEFT_OPEN = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # by webdataset


def streamed(folder: Path, pattern: str) -> list[dict]:
    """All samples as webdataset reads them."""
    paths = [str(path) for path in sorted(folder.glob(pattern))]
    return list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))


@_LEFT_OPEN
def test_images_are_those_that_webdataset_reads(tars, index, tmp_path):
    manifest = index()
    assert manifest.counts == {"train": 15, "val": 6} and manifest.location == str(tars)
    assert manifest.classes == sorted(layouts.WNIDS)
    shards = Shards(tmp_path / "out")
    for split, pattern in (("train", "*train*"), ("val", "*validation*")):
        images, samples = IndexedImages(shards, split), streamed(tars, pattern)
        rows = range(len(images))
        assert images.keys(rows) == [sample["__key__"] for sample in samples]
        assert images.read_jpegs(rows) == [sample["jpg"] for sample in samples]
        assert images.labels.tolist() == [int(sample["cls"]) for sample in samples]
        assert images[0][0].dim() == 3
    verify.verify_all(tmp_path / "out")


@_LEFT_OPEN
@pytest.mark.parametrize("suffix", ["jpeg", "JPEG", "png"])
def test_other_image_suffixes_are_accepted(tmp_path, suffix):
    tars = layouts.shards(layouts.images(), tmp_path / "tars", suffix=suffix)
    index_shards(str(tars), tmp_path / "out", labels="own")
    images = IndexedImages(tmp_path / "out", "train")
    assert images.read_jpegs(range(len(images))) == [sample[suffix.lower()] for sample in streamed(tars, "*train*")]
    assert images[3][0].dim() == 3


def test_shards_at_a_url_have_the_index_of_the_folder(tars, index, tmp_path):
    local = index()
    files, url = fsspec.filesystem("memory"), f"memory://{tmp_path.name}/tars"
    files.put(str(tars), f"{tmp_path.name}/tars", recursive=True)
    remote = index_shards(url, tmp_path / "remote", labels="own")
    assert remote == replace(local, source=url, location=url)
    images, there = IndexedImages(tmp_path / "out", "train"), IndexedImages(tmp_path / "remote", "train")
    assert there.read_jpegs(range(len(there))) == images.read_jpegs(range(len(images)))


@pytest.mark.slow
def test_ray_tasks_find_what_one_process_finds(tars, index, tmp_path):
    assert index_shards(str(tars), tmp_path / "tasks", labels="own", in_process=False) == index()
    (tars / FIRST_SHARD).write_bytes((tars / FIRST_SHARD).read_bytes()[:700])
    with pytest.raises(ShardError, match=FIRST_SHARD) as error:
        index_shards(str(tars), tmp_path / "tasks", labels="own", in_process=False)
    assert type(error.value) is ShardError


def test_an_interrupted_indexing_resumes(tars, index, tmp_path, monkeypatch):
    expected = index()
    (tmp_path / "out" / "manifest.json").unlink()
    scanned: list[str] = []

    def counting(store: Store, name: str) -> tar_scan.TarScan:
        if len(scanned) == 4:
            raise KeyboardInterrupt
        scanned.append(name)
        return scan_tar(store, name)

    monkeypatch.setattr("pipeline.packing.indexing.scan_tar", counting)
    with pytest.raises(KeyboardInterrupt):
        index()
    path = tars / scanned[1]
    path.write_bytes(path.read_bytes())
    again, scanned[:] = scanned[1], []
    assert index() == expected
    assert len(scanned) == 3 and again in scanned
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "manifest.json",
        "train.index.parquet",
        "val.index.parquet",
    }


def test_progress_logs_rate_and_time_left(tars, index, caplog, monkeypatch):
    monkeypatch.setattr(progress, "_LOG_INTERVAL_S", 0)
    caplog.set_level("INFO")
    index()
    messages = [record.getMessage() for record in caplog.records if record.getMessage().startswith("indexing: ")]
    assert len(messages) == 6
    assert re.fullmatch(r"indexing: 0 of 0 MB, 21 images, \d+ MB/s, 0 min left", messages[-1])


def test_a_missing_shard_is_named(tars, index):
    (tars / "imagenet1k-train-0002.tar").unlink()
    with pytest.raises(ShardError, match="shard number 2 is missing beside imagenet1k-train-0001.tar"):
        index()
    (tars / "imagenet1k-train-0003.tar").unlink()
    index()
    info = {"splits": {"train": {"filenames": [FIRST_SHARD, "imagenet1k-train-0002.tar"], "shard_lengths": [4, 4]}}}
    (tars / "_info.json").write_text(json.dumps(info))
    with pytest.raises(ShardError, match="imagenet1k-train-0002.tar is missing: _info.json lists it"):
        index()
    info["splits"]["train"] = {"filenames": [FIRST_SHARD], "shard_lengths": [5]}
    (tars / "_info.json").write_text(json.dumps(info))
    with pytest.raises(ShardError, match=f"{FIRST_SHARD} has 4 images, but _info.json lists 5"):
        index()
    for path in tars.glob("*train*"):
        path.unlink()
    with pytest.raises(ShardError, match=r"no tars of the split train: expected \*train\*.tar, found 2 others"):
        index()


def test_a_missing_folder_is_reported(tmp_path):
    with pytest.raises(ShardError, match="nowhere cannot be listed: No such file"):
        index_shards(str(tmp_path / "nowhere"), tmp_path / "out", labels="own")
    with pytest.raises(ShardError, match="is the output folder of the indices"):
        index_shards(str(tmp_path), tmp_path, labels="own")


@pytest.fixture
def flopeq_shards(tmp_path: Path) -> Path:
    """Shards that flopeq wrote."""
    source = layouts.folder_tree(layouts.images(), tmp_path / "source")
    pack.pack_source(str(source), tmp_path / "own", images_per_shard=4, seed=0, in_process=True)
    return tmp_path / "own"


@pytest.mark.parametrize("at", ["folder", "memory"])
def test_flopeq_shards_elsewhere_keep_their_indices(flopeq_shards, tmp_path, at):
    place = str(flopeq_shards)
    if at == "memory":
        place = f"memory://{tmp_path.name}/own"
        fsspec.filesystem("memory").put(str(flopeq_shards), f"{tmp_path.name}/own", recursive=True)
    manifest = index_shards(place, tmp_path / "out", labels="own")
    before = Shards(flopeq_shards)
    assert asdict(manifest) == before.manifest | {"location": place, "source": place}
    assert Shards(tmp_path / "out").fingerprint == before.fingerprint
    images, there = IndexedImages(flopeq_shards, "train"), IndexedImages(tmp_path / "out", "train")
    assert there.read_jpegs(range(len(there))) == images.read_jpegs(range(len(images)))
    verify.verify_all(tmp_path / "out")
    again = index_shards(str(tmp_path / "out"), tmp_path / "again", labels="own")
    assert again.location == place
    with pytest.raises(ShardError, match="have the labels 'own': set data.labels to 'own'"):
        index_shards(place, tmp_path / "out", labels="imagenet")


def test_damaged_flopeq_shards_elsewhere_are_named(flopeq_shards, tmp_path):
    path = flopeq_shards / "val.index.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?")
    with pytest.raises(ShardError, match="val.index.parquet does not match its manifest"):
        index_shards(str(flopeq_shards), tmp_path / "out", labels="own")
    path.write_bytes(content)
    (flopeq_shards / "train-000001.tar").unlink()
    with pytest.raises(ShardError, match="train-000001.tar is in the manifest but missing"):
        index_shards(str(flopeq_shards), tmp_path / "out", labels="own")
    (flopeq_shards / "manifest.json").write_text('{"classes": []}')
    with pytest.raises(ShardError, match="manifest.json is not a manifest of this version of flopeq"):
        index_shards(str(flopeq_shards), tmp_path / "out", labels="own")
    with pytest.raises(ShardError, match="is from another version of flopeq: run `dvc repro --force shard`"):
        manifests.read_manifest(flopeq_shards)


def test_a_shard_that_changed_after_indexing_is_found(tars, index, tmp_path):
    index()
    verify.mark_verified(tmp_path / "out")
    files = sorted(tars.glob("*train*"))
    content = files[0].read_bytes()
    files[0].write_bytes(files[1].read_bytes())
    files[1].write_bytes(content)
    with pytest.raises(ShardError, match=f"{FIRST_SHARD}: its contents differ(.|\n)*restore the files at {tars}"):
        verify.verify_changed(tmp_path / "out")
    with pytest.raises(ShardError, match=FIRST_SHARD):
        IndexedImages(tmp_path / "out", "train")[0]
