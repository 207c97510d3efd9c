"""The format on disk: `manifest.json`, the index of a split, and the content hash of a data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.base.errors import ShardError
from pipeline.base.files import atomic_path, checksum_file
from pipeline.shards.locations import open_store
from pipeline.shards.store import is_url


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """Reads `manifest.json` from a folder of shards. Raises: ShardError if it is missing or invalid."""
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise ShardError(f"{path} not found: run `dvc repro shard` to write the shards") from None
    except ValueError:
        raise ShardError(f"{path} is not valid JSON: run `dvc repro --force shard` to write it again") from None
    if not {"location", "shards", "indices", "classes", "counts"} <= manifest.keys():
        raise ShardError(f"{path} is from another version of flopeq: run `dvc repro --force shard` to write it again")
    return manifest


def shards_location(folder: Path, manifest: Mapping[str, Any]) -> Path | str:
    """Returns the folder or URL of the tars: the `location` of the manifest, or else the folder of the manifest."""
    location = manifest["location"] or "."
    return location if is_url(location) else folder / location


SPLITS = ("train", "val")

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),  # name of the tar
        ("offset", pa.int64()),  # of the first byte of the JPEG in the tar, in bytes
        ("size", pa.int64()),  # of the JPEG, in bytes
        ("label", pa.int64()),
    ]
)

FileEntry = dict[str, Any]
"""The `size` of a file in bytes and its checksum `xxh3` (pipeline.base.files)."""


@dataclass(frozen=True)
class Manifest:
    """Content of a folder of shards. `manifest.json` has the same fields."""

    source: str
    """The value of `data.source`."""
    layout: str
    """The detected layout of the source, in words."""
    location: str | None
    """Folder or URL of the tars. None means the folder of the manifest."""
    seed: int | None
    """Seed of the order of the training images. None means that the original order was kept."""
    images_per_shard: int | None
    """Number of images per tar, except in the last tar of a split, before bad images are left out. None means that the
    tars were not written by flopeq."""
    labels: str
    """Numbering of the labels: `own` or `imagenet`."""
    classes: list[str]
    """Names of the classes. A label is an index into this list."""
    counts: dict[str, int]
    """Number of images per split."""
    shards: dict[str, FileEntry]
    """Tars by name."""
    indices: dict[str, FileEntry]
    """Indices by name, one per split."""
    oddities: dict[str, int]
    """Number of images per kind of issue. `oddities.csv` lists the images by name."""
    skipped: dict[str, str]
    """Bad images that were left out, each with the reason."""
    ignored: list[str]
    """Files of the source that are not images, judging by their suffix."""


def write_index(out: Path, split: str, table: pa.Table, entries: dict[str, FileEntry]) -> None:
    """Writes the index of a split and adds its entry to `entries`."""
    name = f"{split}.index.parquet"
    with atomic_path(out / name) as path:
        pq.write_table(table, path)
        entries[name] = {"size": path.stat().st_size, "xxh3": checksum_file(path)}


def write_manifest(out: Path, manifest: Manifest) -> None:
    """Writes `manifest.json`. It is written last, so its presence marks the shards as complete."""
    with atomic_path(out / "manifest.json") as path:
        path.write_text(f"{json.dumps(asdict(manifest), indent=1)}\n")


class Shards:
    """A complete folder of shards: every file in the manifest exists and has the right size.

    The tars are in the folder of the manifest or at its `location`, which is a folder (relative to the manifest) or an
    fsspec URL. This class does not compare checksums, which takes longer; pipeline/shards/verify.py does.

    Args:
        cache_gib: size limit of the node-local cache for shards at a URL, in GiB. 0 turns the cache off.
    Raises: ShardError, naming the file, if a file is missing or has another size.
    """

    def __init__(self, folder: Path | str, *, cache_gib: float = 0) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        open_store(self.folder, self.manifest["indices"]).check()
        location = self.manifest["location"] or "."
        self.store = open_store(
            location if is_url(location) else self.folder / location, self.manifest["shards"], cache_gib=cache_gib
        )
        self.store.check()

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the labels."""
        return self.manifest["classes"]

    @property
    def num_classes(self) -> int:
        """Number of classes, which is the number of outputs of a model."""
        return len(self.classes)

    @property
    def fingerprint(self) -> str:
        """A hash of the data that training reads: classes, images and their order. The location does not matter."""
        visible = {key: self.manifest[key] for key in ("classes", "counts", "indices", "shards")}
        return hashlib.sha256(json.dumps(visible, sort_keys=True).encode()).hexdigest()

    def num_images(self, split: str) -> int:
        """Returns the number of images of `train` or `val`."""
        return self.manifest["counts"][split]
