"""Indexes existing WebDataset shards in location: timm's ImageNet and similar data sets, or flopeq's own shards.

Nothing is copied or reordered. `{train,val}.index.parquet` list the images in the order of the names of the tars, and
the manifest holds the location of the tars. Each tar is read once, because only the tar itself lists its content. The
results are saved per tar, so an interrupted run does not read a tar again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import cluster
from pipeline.base.errors import ShardError
from pipeline.base.files import atomic_path, new_checksum
from pipeline.base.imagenet import WNID_PATTERN
from pipeline.base.progress import progress_bar
from pipeline.packing.labels import SampleClass, assign_labels
from pipeline.packing.tar_scan import SAMPLES_SCHEMA, TarScan, scan_tar
from pipeline.shards.locations import list_files, open_store
from pipeline.shards.manifests import INDEX_SCHEMA, SPLITS, FileEntry, Manifest, write_index, write_manifest
from pipeline.shards.store import Store, is_url

_RAY_MIN_BYTES = 256 << 20  # below this size, starting Ray takes longer than reading the tars

_NUMBERED_NAME = re.compile(r"(?P<stem>.*?)(?P<number>\d+)(?:-of-(?P<total>\d+))?\.tar")

_SCANS_DIR = ".scans"
"""Folder of the scans of the tars. It is deleted when the index is complete."""

_CLASS_NAME_FILES = ("classes.txt", "classes.json", "classes")
"""Files beside the tars that may list the class names by number: one name per line, or a JSON list or dictionary."""

_INFO_FILES = ("_info.json", "info.json")
"""Files in which timm lists the tars of each split and their numbers of images."""


def index_shards(location: str, out: Path, *, labels: str, in_process: bool | None = None) -> Manifest:
    """Writes indices and a manifest into `out` for the tars in a folder or at an fsspec URL.

    Tars with "train" in their name hold training images, those with "val" validation images. Other tars are ignored.
    Images are not decoded.

    Args:
        labels: `own` or `imagenet`, as data.labels.
        in_process: whether to read all tars in this process instead of Ray tasks. None decides by the total size.
    Raises: ShardError, naming the tar and the key, for samples that are damaged, duplicate or without a class.
    """
    out = Path(out)
    resolved = location.rstrip("/") if is_url(location) else str(Path(location).resolve())
    if Path(resolved) == out.resolve():
        raise ShardError(f"{location} is the output folder of the indices: change data.name or data.source")
    sizes = list_files(resolved)
    out.mkdir(parents=True, exist_ok=True)
    (out / "manifest.json").unlink(missing_ok=True)
    if "manifest.json" in sizes:
        manifest = _adopt_manifest(resolved, sizes, out, labels)
    else:
        manifest = _build_index(resolved, sizes, out, labels, in_process)
    manifest = replace(manifest, source=location)
    write_manifest(out, manifest)
    shutil.rmtree(out / _SCANS_DIR, ignore_errors=True)
    return manifest


def _adopt_manifest(location: str, sizes: Mapping[str, int], out: Path, labels: str) -> Manifest:
    """Copies the indices of flopeq's own shards at another location and returns their manifest."""
    manifest = _load_manifest(location, sizes)
    if manifest.labels != labels:
        raise ShardError(
            f"the shards at {location} have the labels {manifest.labels!r}: set data.labels to {manifest.labels!r}"
        )
    store = open_store(location, manifest.indices)
    store.check()
    for name, entry in manifest.indices.items():
        content = b"".join(store.stream(name))
        digest = new_checksum()
        digest.update(content)
        if digest.hexdigest() != entry["xxh3"]:
            raise ShardError(f"{store.location_of(name)} does not match its manifest: copy the shards there again")
        with atomic_path(out / name) as path:
            path.write_bytes(content)
    tars = manifest.location or location
    if not is_url(tars) and not is_url(location):
        tars = str(Path(location) / tars)
    open_store(tars, manifest.shards).check()
    return replace(manifest, location=tars)


def _load_manifest(location: str, sizes: Mapping[str, int]) -> Manifest:
    """Reads the manifest in a folder or at a URL."""
    content = _read_file(location, "manifest.json", sizes)
    try:
        return Manifest(**json.loads(content))
    except (TypeError, ValueError) as error:
        raise ShardError(f"{location}/manifest.json is not a manifest of this version of flopeq: {error}") from None


def _read_file(location: str, name: str, sizes: Mapping[str, int]) -> bytes:
    return b"".join(open_store(location, {name: {"size": sizes[name]}}).stream(name))


def _build_index(location: str, sizes: Mapping[str, int], out: Path, labels: str, in_process: bool | None) -> Manifest:
    splits = _split_tars(location, sizes)
    tars = [name for names in splits.values() for name in names]
    store = open_store(location, {name: {"size": sizes[name]} for name in tars})
    scans = _scan_tars(store, {name: sizes[name] for name in tars}, out / _SCANS_DIR, in_process)
    _check_counts(location, sizes, scans)
    classes_by_split: dict[str, dict[SampleClass, str]] = {
        split: _find_classes(store, [scans[name] for name in names]) for split, names in splits.items()
    }
    examples = classes_by_split["val"] | classes_by_split["train"]
    classes, label_of = assign_labels(examples, _load_class_names(location, sizes), labels)
    train_labels = {label_of[class_] for class_ in classes_by_split["train"]}
    for class_, example in classes_by_split["val"].items():
        if label_of[class_] not in train_labels:
            raise ShardError(f"{example}: no training image has its class, {classes[label_of[class_]]}")
    indices: dict[str, FileEntry] = {}
    counts = {}
    for split, names in splits.items():
        table = pa.concat_tables([_index_rows(scans[name], label_of) for name in names])
        _check_unique_keys(store, table)
        write_index(out, split, table.combine_chunks(), indices)
        counts[split] = table.num_rows
    return Manifest(
        source=location,
        layout="WebDataset shards",
        location=location,
        seed=None,
        images_per_shard=None,
        labels=labels,
        classes=classes,
        counts=counts,
        indices=indices,
        shards={name: {"size": scans[name].size, "xxh3": scans[name].xxh3} for name in tars},
        oddities={},
        skipped={},
        ignored=sorted(set(sizes) - set(tars)),
    )


def _scan_tars(store: Store, sizes: Mapping[str, int], scans_dir: Path, in_process: bool | None) -> dict[str, TarScan]:
    scans_dir.mkdir(exist_ok=True)
    signatures = {name: _stat_signature(store.location_of(name), size) for name, size in sizes.items()}
    saved = {name: _load_scan(scans_dir / f"{name}.parquet", signature) for name, signature in signatures.items()}
    scans = {name: scan for name, scan in saved.items() if scan}
    remaining = [name for name in sizes if name not in scans]
    total = sum(sizes[name] for name in remaining)
    if in_process is None:
        in_process = total < _RAY_MIN_BYTES
    with progress_bar("indexing", total) as advance:
        for found in cluster.run_tasks(partial(scan_tar, store), remaining, in_process=in_process):
            if found.size != sizes[found.shard]:
                raise ShardError(f"{store.location_of(found.shard)} changed while it was read: run this again")
            scans[found.shard] = found
            _save_scan(scans_dir / f"{found.shard}.parquet", found, signatures[found.shard])
            advance(images=found.samples.num_rows, num_bytes=found.size)
    return scans


def _stat_signature(path: str, size: int) -> str:
    """Returns a string that changes when the tar changes. At a URL only the size is available."""
    if is_url(path):
        return str(size)
    stat = os.stat(path)
    return f"{size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"


def _save_scan(path: Path, found: TarScan, signature: str) -> None:
    metadata = {"mark": signature, "size": str(found.size), "xxh3": found.xxh3}
    with atomic_path(path) as partial_path:
        pq.write_table(found.samples.replace_schema_metadata(metadata), partial_path)


def _load_scan(path: Path, signature: str) -> TarScan | None:
    """Returns the saved scan of a tar, or None if there is none or the tar has changed since."""
    try:
        samples = pq.read_table(path)
    except (OSError, pa.ArrowInvalid):
        return None
    metadata = {key.decode(): value.decode() for key, value in (samples.schema.metadata or {}).items()}
    if metadata.get("mark") != signature:
        return None
    return TarScan(
        path.name.removesuffix(".parquet"), int(metadata["size"]), metadata["xxh3"], samples.cast(SAMPLES_SCHEMA)
    )


def _find_classes(store: Store, scans: list[TarScan]) -> dict[SampleClass, str]:
    """Returns the classes of the samples, each with the name of one sample."""
    examples: dict[SampleClass, str] = {}
    for found in scans:
        first = found.samples.group_by(["number", "name"], use_threads=False).aggregate([("key", "first")])
        for row in first.to_pylist():
            examples.setdefault((row["number"], row["name"]), f"{store.location_of(found.shard)}: {row['key_first']}")
    return examples


def _index_rows(found: TarScan, label_of: Mapping[SampleClass, int]) -> pa.Table:
    """Returns the index rows of a tar."""
    samples = found.samples
    classes = zip(samples["number"].to_pylist(), samples["name"].to_pylist(), strict=True)
    return pa.table(
        [
            samples["key"],
            pa.array([found.shard] * samples.num_rows, pa.string()),
            samples["offset"],
            samples["size"],
            pa.array([label_of[class_] for class_ in classes], pa.int64()),
        ],
        INDEX_SCHEMA,
    )


def _check_unique_keys(store: Store, table: pa.Table) -> None:
    counts = table.group_by("key").aggregate([("shard", "count")])
    duplicates = counts.filter(pa.array(counts["shard_count"].to_numpy() > 1))
    if duplicates.num_rows:
        key, keys = duplicates["key"][0], table["key"]
        first = keys.index(key).as_py()
        second = keys.index(key, start=first + 1).as_py()
        raise ShardError(
            f"{store.location_of(table['shard'][first].as_py())}: key {key} is repeated in {table['shard'][second]} "
            f"({duplicates.num_rows} of {counts.num_rows} keys are repeated): every image needs a unique key"
        )


def _check_counts(location: str, sizes: Mapping[str, int], scans: Mapping[str, TarScan]) -> None:
    """Raises ShardError if timm's list beside the tars names other tars or other numbers of images."""
    for name in _INFO_FILES:
        if name not in sizes:
            continue
        try:
            splits = json.loads(_read_file(location, name, sizes))["splits"].values()
            expected: dict[str, int] = {}
            for split in splits:
                expected.update(zip(split["filenames"], split["shard_lengths"], strict=True))
        except (AttributeError, KeyError, TypeError, ValueError):
            continue  # another file of that name
        for tar, num in expected.items():
            if any(split in tar for split in SPLITS) and tar not in scans:
                raise ShardError(f"{location}/{tar} is missing: {name} lists it")
            if tar in scans and scans[tar].samples.num_rows != num:
                raise ShardError(f"{location}/{tar} has {scans[tar].samples.num_rows} images, but {name} lists {num}")


def _load_class_names(location: str, sizes: Mapping[str, int]) -> list[str] | None:
    """Reads the class names by number from a file beside the tars. A line that starts with a wnid is reduced to it."""
    for name in _CLASS_NAME_FILES:
        if name not in sizes:
            continue
        content = _read_file(location, name, sizes).decode()
        names: Any = json.loads(content) if content.lstrip()[:1] in ("[", "{") else content.splitlines()
        if isinstance(names, dict):
            names = {int(key): value for key, value in names.items()}
            names = [names[number] for number in range(len(names))]
        lines = [str(line).strip() for line in names]
        return [match.group() if (match := WNID_PATTERN.match(line)) else line for line in lines if line]
    return None


def _split_tars(location: str, sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Returns the tars of each split, sorted by name. Raises: ShardError if a number is missing in their sequence."""
    tars = sorted(name for name in sizes if name.endswith(".tar"))
    splits = {split: [name for name in tars if split in name.lower()] for split in SPLITS}
    if both := set(splits["train"]) & set(splits["val"]):
        raise ShardError(f"{location}/{min(both)}: the name matches both train and val: rename the tar")
    for split, names in splits.items():
        if not names:
            found = f"{len(tars)} others, such as {tars[0]}" if tars else "no .tar files"
            raise ShardError(f"{location} has no tars of the split {split}: expected *{split}*.tar, found {found}")
        numbers = defaultdict(dict)
        for name in names:
            if match := _NUMBERED_NAME.fullmatch(name):
                numbers[match["stem"], match["total"]][int(match["number"])] = name
        for (_, total), named in numbers.items():
            expected = range(int(total)) if total else range(min(named), max(named) + 1)
            if missing := sorted(set(expected) - set(named)):
                before = max((number for number in named if number < missing[0]), default=min(named))
                raise ShardError(f"{location}: shard number {missing[0]} is missing beside {named[before]}")
    return splits
