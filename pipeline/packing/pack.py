"""Packs source images into WebDataset tars and writes an index of them. The same images always give the same bytes.

A folder of shards contains `train-000000.tar ...` and `val-000000.tar ...` (for each image `<key>.jpg`, then
`<key>.cls` with the label as a number), `{train,val}.index.parquet` (one row per image, in the order of the tars),
`oddities.csv` and `manifest.json`, which is written last. Validation images are sorted by name. Training images are
sorted by a seeded hash of their names, so that sequential readers see mixed classes too.

The content of a shard depends only on the names, labels, sizes and contents of its images. Every finished shard leaves
a record, and the next run keeps the shard if its checksum still matches. So an interrupted run continues where it
stopped, and only damaged shards are written again.
"""

from __future__ import annotations

import contextlib
import csv
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import cluster
from pipeline.base.errors import ShardError, SourceError
from pipeline.base.files import atomic_path
from pipeline.base.progress import progress_bar
from pipeline.packing.shard_layout import ShardLayout
from pipeline.packing.shard_task import RECORDS_DIR, ShardRecord, record_path, write_shard
from pipeline.packing.sources.detect import ExistingShards, detect_source
from pipeline.packing.sources.listing import Listing
from pipeline.shards.manifests import SPLITS, FileEntry, Manifest, write_index, write_manifest

ISSUES_FILE = "oddities.csv"
"""File that lists the images with issues by name."""

_RAY_MIN_BYTES = 256 << 20  # below this size, starting Ray takes longer than writing the shards

_MAX_LISTED = 20  # number of bad images that an error lists


def pack_source(
    source: str,
    out: Path,
    *,
    images_per_shard: int,
    seed: int,
    labels: str = "own",
    class_names: Sequence[str] | None = None,
    on_bad_image: str = "error",
    in_process: bool | None = None,
) -> Manifest:
    """Packs the images at `source` into shards in `out`. Existing shards are only indexed.

    Args:
        class_names: names of the classes of IDX files, as data.class_names.
        on_bad_image: `error` or `skip`.
        in_process: whether to write all shards in this process instead of Ray tasks. None decides by the total size.
    Raises: SourceError, ShardError, ClusterError; see `pack_listing`.
    """
    detected = detect_source(source, class_names)
    if isinstance(detected, ExistingShards):
        from pipeline.packing import indexing  # imported only when it is needed

        return indexing.index_shards(detected.location, out, labels=labels)
    logging.info("%s is %s", source, detected.layout)
    return pack_listing(
        detected.list_images(labels),
        detected.root,
        out,
        source=source,
        images_per_shard=images_per_shard,
        seed=seed,
        labels=labels,
        on_bad_image=on_bad_image,
        in_process=in_process,
    )


def pack_listing(
    listing: Listing,
    root: Path,
    out: Path,
    *,
    source: str,
    images_per_shard: int,
    seed: int,
    labels: str = "own",
    on_bad_image: str = "error",
    in_process: bool | None = None,
) -> Manifest:
    """Packs the images of a listing into shards in `out`. JPEGs are copied unchanged.

    A file gets its final name when it is complete; the manifest comes last. Files are not synced to disk.

    Args:
        root: folder to which the file names of the listing are relative.
    Raises: SourceError for bad images (with all of them, after the other shards are written) or if the source changed;
        ShardError if the disk is full or is not shared with the nodes that write.
    """
    root, out = Path(root).absolute(), Path(out).absolute()
    layout = ShardLayout(
        listing, root, out, images_per_shard=images_per_shard, seed=seed, skip_bad_images=on_bad_image == "skip"
    )
    (out / RECORDS_DIR).mkdir(parents=True, exist_ok=True)
    _remove_stale_files(out, layout)
    _check_disk_space(layout, out)
    total = layout.num_bytes()
    records: dict[str, ShardRecord] = {}
    with progress_bar(f"sharding {out.name}", total) as advance:
        for record in cluster.run_tasks(
            write_shard, layout.tasks(), in_process=total < _RAY_MIN_BYTES if in_process is None else in_process
        ):
            records[record.shard] = record
            advance(images=record.num_images, num_bytes=record.num_bytes)
    bad_images = {name: reason for record in records.values() for name, reason in record.bad.items()}
    if bad_images and on_bad_image != "skip":
        raise SourceError(_format_bad_images(bad_images))
    shards = {shard: records[shard].entry for shard in sorted(records)}
    _check_shared_disk(out, shards)
    indices: dict[str, FileEntry] = {}
    counts = {}
    for split in SPLITS:
        tables = [pq.ParquetFile(record_path(out, shard)).read() for shard in layout.shards(split)]
        table = pa.concat_tables(tables).combine_chunks().replace_schema_metadata(None)
        counts[split] = len(table)
        if not counts[split]:
            raise SourceError(f"no image of {split} is left: all of them are bad")
        write_index(out, split, table, indices)
    issues = sorted(tuple(issue) for record in records.values() for issue in record.findings)
    with atomic_path(out / ISSUES_FILE) as path, path.open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["name", "oddity", "done"])
        lines.writerows(issues)
    manifest = Manifest(
        source=source,
        layout=listing.layout,
        location=None,
        seed=seed,
        images_per_shard=images_per_shard,
        labels=labels,
        classes=listing.classes,
        counts=counts,
        shards=shards,
        indices=indices,
        oddities=dict(sorted(Counter(kind for _, kind, _ in issues).items())),
        skipped=dict(sorted(bad_images.items())),
        ignored=listing.ignored,
    )
    write_manifest(out, manifest)
    return manifest


def _remove_stale_files(out: Path, layout: ShardLayout) -> None:
    """Deletes outdated files, the manifest first. Keeps shards and records whose names are in the layout."""
    keep_names = {shard for split in SPLITS for shard in layout.shards(split)}
    keep_names |= {record_path(out, shard).name for shard in keep_names}
    for folder, patterns in (
        (out, ("manifest.json", ISSUES_FILE, "*.partial", *(f"{split}[-.]*" for split in SPLITS))),
        (out / RECORDS_DIR, ("*",)),
    ):
        for pattern in patterns:
            for path in folder.glob(pattern):
                if path.name not in keep_names:
                    path.unlink()


def _check_disk_space(layout: ShardLayout, out: Path) -> None:
    needed = 0
    for shard, size in layout.tar_sizes().items():
        with contextlib.suppress(FileNotFoundError):
            size -= (out / shard).stat().st_size
        needed += max(size, 0)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ShardError(
            f"not enough disk space in {out}: the shards need {needed / 1e6:,.1f} MB more and {free / 1e6:,.1f} MB are "
            f"free. Free some space, or make {out} a link to a folder on a larger disk"
        )


def _check_shared_disk(out: Path, shards: dict[str, FileEntry]) -> None:
    """Raises ShardError if this process does not see the files that the tasks wrote."""
    for shard, entry in shards.items():
        path = out / shard
        if not path.is_file() or path.stat().st_size != entry["size"]:
            raise ShardError(
                f"{path} was written by another node and is not visible on this one: "
                f"make {out} a folder, or a link to one, that all nodes of the cluster share"
            )


def _format_bad_images(bad_images: dict[str, str]) -> str:
    lines = [f"{name}: {reason}" for name, reason in sorted(bad_images.items())]
    if len(lines) > _MAX_LISTED:
        lines[_MAX_LISTED:] = [f"... and {len(lines) - _MAX_LISTED} more"]
    return "\n  ".join(
        [
            f"{len(bad_images)} of the images cannot be decoded:",
            *lines,
            "replace or remove them, or set data.on_bad_image to skip; shards without a bad image are kept",
        ]
    )
