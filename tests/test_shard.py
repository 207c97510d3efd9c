"""Shards: the same bytes for the same source, readable by others, and what is wrong is named."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import IO, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from pipeline import shard
from pipeline.config import ConfigError
from pipeline.data import ShardError, Shards
from pipeline.shard import SourceError
from stages import prepare


def write_image(path: Path, seed: int, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three training images and two validation images of each of two classes."""
    for label in ("cat", "dog"):
        for seed in range(5):
            split, number = ("train", seed) if seed < 3 else ("val", seed - 3)
            write_image(tmp_path / "source" / split / label / f"{number}.jpg", seed + 5 * (label == "dog"))
    return tmp_path / "source"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def members(folder: Path, pattern: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    found = []
    for path in sorted(folder.glob(pattern)):
        with tarfile.open(path) as tar:
            found += [(member, cast(IO[bytes], tar.extractfile(member)).read()) for member in tar]
    return found


def names(folder: Path, pattern: str) -> list[str]:
    return [member.name for member, _ in members(folder, pattern)]


def write(source: Path, out: Path, seed: int = 0) -> shard.Manifest:
    return shard.write_shards(source, out, images_per_shard=4, seed=seed)


def test_bytes_do_not_depend_on_the_order_in_which_the_folder_is_listed(source, tmp_path, monkeypatch):
    write(source, tmp_path / "a")
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listdir(path), reverse=True))
    write(source, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert set(contents(tmp_path / "a")) == {
        "train-000000.tar", "train-000001.tar", "val-000000.tar", "train.index.parquet", "val.index.parquet",
        "manifest.json",
    }


def test_seed_shuffles_training_images_and_leaves_validation_images_sorted(source, tmp_path):
    write(source, tmp_path / "a", seed=0)
    write(source, tmp_path / "b", seed=1)
    train = [names(tmp_path / name, "train-*.tar") for name in "ab"]
    assert train[0] != train[1]
    assert sorted(train[0]) == sorted(train[1]) != train[0]
    val = names(tmp_path / "a", "val-*.tar")
    assert val[::2] == sorted(val[::2]) == names(tmp_path / "b", "val-*.tar")[::2]


def test_index_points_at_the_verbatim_jpeg(source, tmp_path):
    write(source, tmp_path / "out")
    for split in ("train", "val"):
        rows = pq.read_table(tmp_path / "out" / f"{split}.index.parquet").to_pylist()
        assert list(rows[0]) == ["key", "shard", "offset", "size", "label"]
        for row in rows:
            tar = (tmp_path / "out" / row["shard"]).read_bytes()
            jpeg = tar[row["offset"] : row["offset"] + row["size"]]
            assert jpeg == (source / f"{row['key']}.jpg").read_bytes()
            assert row["label"] == ["cat", "dog"].index(row["key"].split("/")[1])


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves that to the collector
def test_plain_webdataset_reads_the_tars_in_the_index_order(source, tmp_path):
    write(source, tmp_path / "out")
    urls = [str(path) for path in sorted((tmp_path / "out").glob("train-*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    rows = pq.read_table(tmp_path / "out" / "train.index.parquet").to_pylist()
    assert [(s["__key__"], int(s["cls"]), len(s["jpg"])) for s in samples] == [
        (row["key"], row["label"], row["size"]) for row in rows
    ]


def test_tar_headers_tell_nothing_of_the_machine(source, tmp_path):
    write(source, tmp_path / "out")
    assert (tmp_path / "out" / "val-000000.tar").read_bytes()[257:265] == b"ustar\x0000"
    for member, _ in members(tmp_path / "out", "*.tar"):
        assert (member.uid, member.gid, member.mtime, member.uname, member.gname) == (0, 0, 0, "", "")


def test_other_formats_become_jpegs_and_other_files_are_skipped_by_name(source, tmp_path):
    write_image(source / "train" / "cat" / "drawing.v2.png", 5)
    write_image(source / "val" / "dog" / "disguised.jpg", 6, format="PNG")
    (source / "train" / "cat" / "notes.txt").write_text("no image")
    (source / "train" / "index.csv").write_text("no image either")
    manifest = write(source, tmp_path / "out")
    assert manifest.reencoded == ["train/cat/drawing.v2.png", "val/dog/disguised.jpg"]
    assert manifest.skipped == ["train/cat/notes.txt", "train/index.csv"]
    assert manifest.counts == {"train": 7, "val": 5}
    assert "train/cat/drawing_v2.jpg" in names(tmp_path / "out", "train-*.tar")
    for member, content in members(tmp_path / "out", "*.tar"):
        if member.name.endswith(".jpg"):
            assert Image.open(io.BytesIO(content)).format == "JPEG"


@pytest.mark.parametrize(("content", "told"), [(b"no image", "not an image"), (None, "truncated")])
def test_unreadable_image_is_named_and_leaves_no_manifest(source, tmp_path, content, told):
    bad = source / "train" / "dog" / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:-100] if content is None else content)
    with pytest.raises(SourceError, match=f"train/dog/1.jpg .*{told}.*: replace or remove it"):
        write(source, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    write_image(bad, 9)
    write(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.partial"))


def test_folder_of_another_shape_is_refused(source, tmp_path):
    write_image(source / "train" / "cat" / "0.png", 1)
    with pytest.raises(SourceError, match=r"has the key train/cat/0 too"):
        write(source, tmp_path / "out")
    (source / "train" / "cat" / "0.png").unlink()
    write_image(source / "val" / "bird" / "0.jpg", 1)
    with pytest.raises(SourceError, match="val/bird: there is no such class"):
        write(source, tmp_path / "out")
    with pytest.raises(SourceError, match="nowhere/train not found"):
        write(tmp_path / "nowhere", tmp_path / "out")


def test_a_smaller_source_leaves_no_shard_of_the_larger_one(source, tmp_path):
    write(source, tmp_path / "out")
    for number in range(3):
        (source / "train" / "dog" / f"{number}.jpg").unlink()
    write(source, tmp_path / "out")
    write(source, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_damaged_shard_is_named_with_what_to_do(source, tmp_path):
    out = tmp_path / "out"
    write(source, out)
    shard.verify(out)
    path = out / "train-000001.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    Shards(out)  # only sizes are compared here
    with pytest.raises(ShardError, match="train-000001.tar does not match .*: delete .* `dvc repro shard`"):
        shard.verify(out)
    path.write_bytes(content[:-512])
    with pytest.raises(ShardError, match=r"train-000001.tar does not match its manifest \(\d+ bytes, not"):
        Shards(out)
    path.unlink()
    with pytest.raises(ShardError, match="train-000001.tar is in the manifest but missing"):
        Shards(out)
    (out / "manifest.json").unlink()
    with pytest.raises(ShardError, match="manifest.json not found: run `dvc repro shard`"):
        Shards(out)


def test_digits_are_written_once_and_split_by_class(tmp_path):
    prepare.write_digits(tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg")}
    counts = Counter(path.parts[-3] for path in written)
    assert counts == {"train": 1437, "val": 360}
    of_class = Counter(path.parts[-2] for path in written if "val" in path.parts)
    assert len(of_class) == 10 and set(of_class.values()) <= {35, 36, 37}
    assert Image.open(io.BytesIO(min(written).read_bytes())).size == (32, 32)

    gone, kept = sorted(written)[:2]
    content = gone.read_bytes()
    gone.unlink()
    listed = prepare.listing(tmp_path)
    prepare.write_digits(tmp_path)
    assert gone.read_bytes() == content
    assert kept.stat().st_mtime_ns == written[kept]
    assert prepare.listing(tmp_path) != listed


def test_digits_do_not_mix_with_images_of_others(tmp_path):
    write_image(tmp_path / "train" / "cat" / "0.jpg", 0)
    with pytest.raises(ConfigError, match="train/cat/0.jpg is none of the digits"):
        prepare.write_digits(tmp_path)
    assert [path.name for path in tmp_path.rglob("*.jpg")] == ["0.jpg"]


@pytest.mark.parametrize("stage", ["prepare", "shard"])
def test_missing_data_folder_is_told_on_the_command_line(root, tmp_path, stage):
    params = (root / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(
        params.replace("name: digits ", "name: mine ").replace("data/source/digits", "data/source/mine"))
    ended = subprocess.run(
        [sys.executable, "-m", f"stages.{stage}"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True, text=True,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: missing data folder: data/source/mine/train and ")
    assert "Traceback" not in ended.stderr
