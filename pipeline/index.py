"""Indexing WebDataset shards where they lie: timm's ImageNet and others of that kind, or flopeq's own elsewhere.

Nothing is copied or reordered: `{train,val}.index.parquet` list the images in the order of the tars' names, and the
manifest says where those lie. Each tar is read once, as it is all there that says what it holds; what was read
before an interruption is not read again.
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
from pipeline.checksum import checksum
from pipeline.imagenet import WNID
from pipeline.labels import Class, assign
from pipeline.progress import progress
from pipeline.shard import INDEX, SPLITS, Entry, Manifest, appearing, write_index, write_manifest
from pipeline.store import ShardError, Store, find, is_url, open_store
from pipeline.tarscan import SAMPLES, Scan, scan

_SMALL = 256 << 20  # bytes of tars below which starting Ray takes longer than reading them
_NUMBERED = re.compile(r"(?P<stem>.*?)(?P<number>\d+)(?:-of-(?P<of>\d+))?\.tar")
_RECEIPTS = ".scans"
"""Folder of what was found in each tar, until the index is complete."""
_CLASSES = ("classes.txt", "classes.json", "classes")
"""Files beside the tars that may name the classes by number: a name a line, or a list or dictionary in JSON."""
_INFO = ("_info.json", "info.json")
"""timm's list of the tars of each split and their numbers of images."""


def index_shards(location: str, out: Path, *, labels: str, in_process: bool | None = None) -> Manifest:
    """Writes indices and a manifest of the tars at a folder or an fsspec URL into `out`.

    Tars with "train" in their names are training images, those with "val" validation images; others are left out.
    Images are not looked at.

    Args:
        labels: `own` or `imagenet`, as data.labels.
        in_process: whether this process reads all tars; None: unless they are worth starting Ray tasks for.
    Raises: ShardError, naming the tar and the key, for what is damaged, missing, there twice or without a class.
    """
    out = Path(out)
    place = location.rstrip("/") if is_url(location) else str(Path(location).resolve())
    if Path(place) == out.resolve():
        raise ShardError(f"{location} is where the indices would be written: give data another name, or another source")
    sizes = find(place)
    out.mkdir(parents=True, exist_ok=True)
    (out / "manifest.json").unlink(missing_ok=True)
    if "manifest.json" in sizes:
        manifest = _adopt(place, sizes, out, labels)
    else:
        manifest = _index(place, sizes, out, labels, in_process)
    manifest = replace(manifest, source=location)
    write_manifest(out, manifest)
    shutil.rmtree(out / _RECEIPTS, ignore_errors=True)
    return manifest


def _adopt(place: str, sizes: Mapping[str, int], out: Path, labels: str) -> Manifest:
    """The manifest and the indices of flopeq's own shards at another place."""
    manifest = _manifest_of(place, sizes)
    if manifest.labels != labels:
        raise ShardError(f"the shards at {place} have the labels {manifest.labels!r}: set data.labels to that")
    store = open_store(place, manifest.indices)
    store.check()
    for name, entry in manifest.indices.items():
        content = b"".join(store.stream(name))
        digest = checksum()
        digest.update(content)
        if digest.hexdigest() != entry["xxh3"]:
            raise ShardError(f"{store.where(name)} does not match its manifest: copy the shards there again")
        with appearing(out / name) as path:
            path.write_bytes(content)
    location = manifest.location or place
    if not is_url(location) and not is_url(place):
        location = str(Path(place) / location)
    open_store(location, manifest.shards).check()
    return replace(manifest, location=location)


def _manifest_of(place: str, sizes: Mapping[str, int]) -> Manifest:
    """The manifest at a folder or URL."""
    content = _read(place, "manifest.json", sizes)
    try:
        return Manifest(**json.loads(content))
    except (TypeError, ValueError) as error:
        raise ShardError(f"{place}/manifest.json is not a manifest of this version of flopeq: {error}") from None


def _read(place: str, name: str, sizes: Mapping[str, int]) -> bytes:
    return b"".join(open_store(place, {name: {"size": sizes[name]}}).stream(name))


def _index(place: str, sizes: Mapping[str, int], out: Path, labels: str, in_process: bool | None) -> Manifest:
    splits = _splits(place, sizes)
    tars = [name for names in splits.values() for name in names]
    store = open_store(place, {name: {"size": sizes[name]} for name in tars})
    scans = _scan_all(store, {name: sizes[name] for name in tars}, out / _RECEIPTS, in_process)
    _compare_counts(place, sizes, scans)
    seen: dict[str, dict[Class, str]] = {
        split: _classes_of(store, [scans[name] for name in names]) for split, names in splits.items()
    }
    classes, label_of = assign(seen["val"] | seen["train"], _listed(place, sizes), labels)
    trained = {label_of[known] for known in seen["train"]}
    for known, where in seen["val"].items():
        if label_of[known] not in trained:
            raise ShardError(f"{where}: no training image has its class, {classes[label_of[known]]}")
    indices: dict[str, Entry] = {}
    counts = {}
    for split, names in splits.items():
        table = pa.concat_tables([_rows(scans[name], label_of) for name in names])
        _refuse_duplicates(store, table)
        write_index(out, split, table.combine_chunks(), indices)
        counts[split] = table.num_rows
    return Manifest(
        source=place, layout="WebDataset shards", location=place, seed=None, images_per_shard=None, labels=labels,
        classes=classes, counts=counts, indices=indices,
        shards={name: {"size": scans[name].size, "xxh3": scans[name].xxh3} for name in tars},
        oddities={}, skipped={}, ignored=sorted(set(sizes) - set(tars)),
    )


def _scan_all(store: Store, sizes: Mapping[str, int], receipts: Path, in_process: bool | None) -> dict[str, Scan]:
    receipts.mkdir(exist_ok=True)
    marks = {name: _mark(store.where(name), size) for name, size in sizes.items()}
    kept = {name: _read_receipt(receipts / f"{name}.parquet", mark) for name, mark in marks.items()}
    scans = {name: found for name, found in kept.items() if found}
    left = [name for name in sizes if name not in scans]
    total = sum(sizes[name] for name in left)
    if in_process is None:
        in_process = total < _SMALL
    with progress("indexing", total) as advance:
        for found in cluster.parallel(partial(scan, store), left, in_process=in_process):
            if found.size != sizes[found.shard]:
                raise ShardError(f"{store.where(found.shard)} changed while it was read: run this again")
            scans[found.shard] = found
            _write_receipt(receipts / f"{found.shard}.parquet", found, marks[found.shard])
            advance(images=found.samples.num_rows, num_bytes=found.size)
    return scans


def _mark(where: str, size: int) -> str:
    """What changes when the tar does; at a URL its size has to do."""
    if is_url(where):
        return str(size)
    stat = os.stat(where)
    return f"{size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"


def _write_receipt(path: Path, found: Scan, mark: str) -> None:
    notes = {"mark": mark, "size": str(found.size), "xxh3": found.xxh3}
    with appearing(path) as partial_path:
        pq.write_table(found.samples.replace_schema_metadata(notes), partial_path)


def _read_receipt(path: Path, mark: str) -> Scan | None:
    """What was found in a tar, if it was read and did not change since."""
    try:
        samples = pq.read_table(path)
    except (OSError, pa.ArrowInvalid):
        return None
    notes = {key.decode(): value.decode() for key, value in (samples.schema.metadata or {}).items()}
    if notes.get("mark") != mark:
        return None
    return Scan(path.name.removesuffix(".parquet"), int(notes["size"]), notes["xxh3"], samples.cast(SAMPLES))


def _classes_of(store: Store, scans: list[Scan]) -> dict[Class, str]:
    """The classes of the samples, and for each one that has it."""
    seen: dict[Class, str] = {}
    for found in scans:
        first = found.samples.group_by(["number", "name"], use_threads=False).aggregate([("key", "first")])
        for row in first.to_pylist():
            seen.setdefault((row["number"], row["name"]), f"{store.where(found.shard)}: {row['key_first']}")
    return seen


def _rows(found: Scan, label_of: Mapping[Class, int]) -> pa.Table:
    """The index's rows of a tar."""
    samples = found.samples
    known = zip(samples["number"].to_pylist(), samples["name"].to_pylist(), strict=True)
    return pa.table([
        samples["key"], pa.array([found.shard] * samples.num_rows, pa.string()), samples["offset"], samples["size"],
        pa.array([label_of[of] for of in known], pa.int64()),
    ], INDEX)


def _refuse_duplicates(store: Store, table: pa.Table) -> None:
    counts = table.group_by("key").aggregate([("shard", "count")])
    twice = counts.filter(pa.array(counts["shard_count"].to_numpy() > 1))
    if twice.num_rows:
        key, keys = twice["key"][0], table["key"]
        first = keys.index(key).as_py()
        second = keys.index(key, start=first + 1).as_py()
        raise ShardError(
            f"{store.where(table['shard'][first].as_py())}: the key {key} comes again in {table['shard'][second]} "
            f"({twice.num_rows} of {counts.num_rows} keys do): each image must have one of its own"
        )


def _compare_counts(place: str, sizes: Mapping[str, int], scans: Mapping[str, Scan]) -> None:
    """Raises ShardError if timm's list beside the tars has others, or other numbers of images."""
    for name in _INFO:
        if name not in sizes:
            continue
        try:
            splits = json.loads(_read(place, name, sizes))["splits"].values()
            expected: dict[str, int] = {}
            for split in splits:
                expected.update(zip(split["filenames"], split["shard_lengths"], strict=True))
        except (AttributeError, KeyError, TypeError, ValueError):
            continue  # a file of that name that is something else
        for tar, num in expected.items():
            if any(split in tar for split in SPLITS) and tar not in scans:
                raise ShardError(f"{place}/{tar} is missing: {name} lists it")
            if tar in scans and scans[tar].samples.num_rows != num:
                raise ShardError(f"{place}/{tar} has {scans[tar].samples.num_rows} images, {num} by {name}")


def _listed(place: str, sizes: Mapping[str, int]) -> list[str] | None:
    """Names of the classes by number, from a file beside the tars; of a line that begins with a wnid, that."""
    for name in _CLASSES:
        if name not in sizes:
            continue
        content = _read(place, name, sizes).decode()
        names: Any = json.loads(content) if content.lstrip()[:1] in ("[", "{") else content.splitlines()
        if isinstance(names, dict):
            names = {int(key): value for key, value in names.items()}
            names = [names[number] for number in range(len(names))]
        words = [str(line).strip() for line in names]
        return [word.group() if (word := WNID.match(line)) else line for line in words if line]
    return None


def _splits(location: str, sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """The tars of each split in the order of their names. Raises: ShardError if a number among them is missing."""
    tars = sorted(name for name in sizes if name.endswith(".tar"))
    splits = {split: [name for name in tars if split in name.lower()] for split in SPLITS}
    if both := set(splits["train"]) & set(splits["val"]):
        raise ShardError(f"{location}/{min(both)}: neither training nor validation images by its name")
    for split, names in splits.items():
        if not names:
            found = f"{len(tars)} others, such as {tars[0]}" if tars else "no .tar at all"
            raise ShardError(f"{location} has no tars of the split {split}: *{split}*.tar is needed, there are {found}")
        numbers = defaultdict(dict)
        for name in names:
            if match := _NUMBERED.fullmatch(name):
                numbers[match["stem"], match["of"]][int(match["number"])] = name
        for (_, of), named in numbers.items():
            expected = range(int(of)) if of else range(min(named), max(named) + 1)
            if missing := sorted(set(expected) - set(named)):
                before = max((number for number in named if number < missing[0]), default=min(named))
                raise ShardError(f"{location}: shard number {missing[0]} is missing beside {named[before]}")
    return splits
