"""A source to pack, shards to index, and what both hold."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

import pyarrow.parquet as pq
import pytest

from pipeline.base import imagenet
from pipeline.packing import pack
from pipeline.packing.indexing import index_shards
from pipeline.shards import manifests
from pipeline.shards.manifests import Manifest
from tests.packing import layouts

PER_SHARD = 4

FIRST_SHARD = "imagenet1k-train-0000.tar"

IMAGENET_LABELS = {wnid: imagenet.wnids().index(wnid) for wnid in layouts.WNIDS}

JPEG = layouts.jpeg(0)


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    """15 training and 6 validation images of three classes, and one image with each issue."""
    return layouts.images(issues=layouts.ISSUES)


@pytest.fixture
def source(images, tmp_path) -> Path:
    return layouts.folder_tree(images, tmp_path / "source")


def write_shards(source: Path, out: Path, seed: int = 0, on_bad_image: str = "error", **options) -> Manifest:
    return pack.pack_source(
        str(source), out, images_per_shard=PER_SHARD, seed=seed, on_bad_image=on_bad_image, **options
    )


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder of shards without the manifest."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "manifest.json"
    }


def members(folder: Path, pattern: str = "*.tar") -> list[tuple[tarfile.TarInfo, bytes]]:
    """The members of the tars, each with its content."""
    all_members = []
    for path in sorted(folder.glob(pattern)):
        with tarfile.open(path) as tar:
            all_members += [(member, cast(IO[bytes], tar.extractfile(member)).read()) for member in tar]
    return all_members


def names(folder: Path, pattern: str) -> list[str]:
    return [member.name for member, _ in members(folder, pattern)]


def modification_times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Shards like timm's: 15 training and 6 validation images of three classes."""
    return layouts.shards(layouts.images(), tmp_path / "tars")


@pytest.fixture
def index(tars: Path, tmp_path: Path) -> Callable[..., manifests.Manifest]:
    """Indexes the shards with the given labels."""
    return lambda labels="own": index_shards(str(tars), tmp_path / "out", labels=labels)


def write_tar(path: Path, **files: bytes) -> None:
    """A tar of those files; `__` in a name stands for the dot before the extension."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            layouts.add_file(tar, name.replace("__", "."), content)


def two_splits(folder: Path, train: dict[str, bytes], val: dict[str, bytes] | None = None) -> Path:
    """One tar of each split, with the same files in both unless others are given for the second."""
    write_tar(folder / "train-0.tar", **train)
    write_tar(folder / "val-0.tar", **(val or train))
    return folder


def labels_of(folder: Path, split: str = "train") -> dict[str, int]:
    table = pq.read_table(folder / f"{split}.index.parquet")
    return dict(zip(table["key"].to_pylist(), table["label"].to_pylist(), strict=True))
