"""Writes one shard, and a record that lets the next run keep the shard."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.base.errors import ShardError
from pipeline.base.files import atomic_path, checksum_file, partial_path
from pipeline.packing import inspection
from pipeline.packing.image_reader import ImageLocation, ImageReader
from pipeline.packing.tar_writer import TarWriter
from pipeline.shards.manifests import INDEX_SCHEMA, FileEntry

RECORDS_DIR = ".receipts"
"""Folder of the records of finished shards."""

_RECORD_METADATA_KEY = b"flopeq"  # key of the record in the metadata of its parquet file

FORMAT_VERSION = "2"  # increase it when the same images give other bytes, so that old shards are written again

ImageIssue = tuple[str, str, str]
"""Name of an image, its issue, and how it was treated."""

IndexRow = tuple[str, int, int, int]
"""Key, offset, size and label of an image: a row of INDEX_SCHEMA without the name of the shard."""


@dataclass(frozen=True)
class ShardTask:
    """A shard to write."""

    root: Path
    out: Path
    shard: str
    images: pa.Table
    """Rows of packing.sources.listing.IMAGES_SCHEMA in the order of the tar, with an additional column `key`."""
    skip: bool
    """Whether to leave out bad images. If false, a shard with a bad image is not written."""

    def num_bytes(self) -> int:
        """Returns the total size of the images."""
        return int(self.images["size"].to_numpy().sum())

    def content_key(self) -> str:
        """Returns a hash of the names, labels and sizes of the images."""
        digest = hashlib.sha256(FORMAT_VERSION.encode())
        for column in ("name", "label", "size"):
            digest.update("\n".join(map(str, self.images[column].to_pylist())).encode() + b"\0")
        return digest.hexdigest()


@dataclass(frozen=True)
class ShardRecord:
    """Result of a finished shard. It is saved in the metadata of a parquet file with the index rows of the shard."""

    shard: str
    identity: str
    """`ShardTask.content_key` of the task."""
    entry: FileEntry
    num_images: int
    num_bytes: int
    """Total size of its images in the source."""
    findings: list[ImageIssue]
    bad: dict[str, str]
    """Images that cannot be decoded, each with the reason."""


def write_shard(task: ShardTask) -> ShardRecord:
    """Writes a shard and its record, unless both exist and are valid.

    If there are bad images and they are not to be skipped, writes neither.
    """
    if existing := _existing_record(task):
        return existing
    path, parquet_path = task.out / task.shard, record_path(task.out, task.shard)
    parquet_path.unlink(missing_ok=True)
    partial = partial_path(path)
    try:
        with TarWriter(partial) as tar, ImageReader(task.root) as reader:
            rows, issues, bad_images = _copy_images(task, reader, tar)
            digest = tar.finish()
        record = ShardRecord(
            task.shard,
            task.content_key(),
            {"size": tar.size, "xxh3": digest},
            len(rows),
            task.num_bytes(),
            issues,
            bad_images,
        )
        if bad_images and not task.skip:
            return record
        os.replace(partial, path)
    except OSError as error:
        raise ShardError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
    keys, *numbers = zip(*rows, strict=True) if rows else [()] * 4
    table = pa.table([keys, [task.shard] * len(rows), *numbers], schema=INDEX_SCHEMA)
    with atomic_path(parquet_path) as file:
        pq.write_table(table.replace_schema_metadata({_RECORD_METADATA_KEY: json.dumps(asdict(record))}), file)
    return record


def _copy_images(
    task: ShardTask, reader: ImageReader, tar: TarWriter
) -> tuple[list[IndexRow], list[ImageIssue], dict[str, str]]:
    """Copies the images into the tar. Returns the index rows, the issues, and the bad images with their reasons."""
    rows: list[IndexRow] = []
    issues: list[ImageIssue] = []
    bad_images: dict[str, str] = {}
    columns = {name: column.to_pylist() for name, column in zip(task.images.column_names, task.images, strict=True)}
    fields = (columns[name] for name in ImageLocation._fields)
    locations = [ImageLocation(*values) for values in zip(*fields, strict=True)]
    for name, key, label, location in zip(
        columns["name"], columns["key"], columns["label"], reader.prefetch(locations), strict=True
    ):
        content = tar.reserve(location.size)
        reader.read(location, content)
        try:
            found = inspection.inspect_image(content)
        except inspection.BadImageError as error:
            bad_images[name] = str(error)
            issues.append((name, str(error), inspection.LEFT_OUT))
            continue
        if found:
            treatment = inspection.ENCODED if found.replacement else inspection.KEPT
            issues += [(name, issue, treatment) for issue in found.issues]
            content = found.replacement or content
        offset = tar.add(f"{key}.jpg", content)
        tar.add(f"{key}.cls", str(label).encode())
        rows.append((key, offset, len(content), label))
    return rows, issues, bad_images


def _existing_record(task: ShardTask) -> ShardRecord | None:
    """Returns the record of a shard that exists, has the same images, and is undamaged; otherwise None."""
    path = task.out / task.shard
    try:
        content = pq.read_schema(record_path(task.out, task.shard)).metadata[_RECORD_METADATA_KEY]
        record = ShardRecord(**json.loads(content))
        if record.identity != task.content_key() or (record.bad and not task.skip):
            return None
        unchanged = path.stat().st_size == record.entry["size"] and checksum_file(path) == record.entry["xxh3"]
        return record if unchanged else None
    except (OSError, ValueError, TypeError, KeyError):  # there is no record, or it cannot be read
        return None


def record_path(out: Path, shard: str) -> Path:
    """Returns the path of the record of a shard."""
    return out / RECORDS_DIR / f"{shard}.parquet"
