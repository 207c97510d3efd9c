"""Writing shards: WebDataset tars and an index of where each JPEG lies, the same bytes for the same images.

A folder of shards holds `train-000000.tar ...`, `val-000000.tar ...` (`<key>.jpg`, then `<key>.cls`, the label as a
number), `{train,val}.index.parquet` (a row an image, in the tars' order), `oddities.csv` and, last to appear,
`manifest.json`. Validation images lie in sorted order, training images in the order of a seeded hash of their names,
so that readers that only stream see mixed classes too.

A shard follows from the names, labels, sizes and contents of its images alone. Each one that is finished leaves a
receipt, and is kept by the next run if it still has its hash: an interrupted run goes on, and of damaged shards only
these are written again.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import cluster, jpeg
from pipeline.checksum import checksum_of
from pipeline.gather import Place, Reader, Tar, tar_size
from pipeline.progress import progress
from pipeline.sources import ExistingShards, Listing, SourceError, detect
from pipeline.store import ShardError
from pipeline.tarsum import quick_headers

SPLITS = ("train", "val")
INDEX = pa.schema([
    ("key", pa.string()),
    ("shard", pa.string()),  # name of the tar
    ("offset", pa.int64()),  # of the JPEG's first byte in the tar
    ("size", pa.int64()),  # of the JPEG, in bytes
    ("label", pa.int64()),
])
RECEIPTS = ".receipts"
_NOTES = b"flopeq"  # key of a receipt in a parquet file's metadata
ODDITIES = "oddities.csv"
_RECIPE = "1"  # changes with the bytes that are written for the same images, so that no shard of old is kept
_SMALL = 256 << 20  # bytes of images below which starting Ray takes longer than the writing
_NAMED = 20  # bad images that an error names
_CHUNK = 1 << 16  # names that are Python objects at a time

Entry = dict[str, Any]
"""`size` in bytes and `xxh3` (pipeline.checksum) of a file."""
Finding = tuple[str, str, str]
"""Name of an image, what is odd about it, and what was done."""
Row = tuple[str, int, int, int]
"""Key, offset, size and label of an image: INDEX without the shard's name."""


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds; `manifest.json` is this, field by field."""

    source: str
    """What data.source named."""
    layout: str
    """What was found there, in words."""
    location: str | None
    """Folder or URL of the tars; None: beside the manifest."""
    seed: int | None
    """Seed of the training images' order; None: they lie as they were found."""
    images_per_shard: int | None
    """Images in each tar but a split's last, before bad ones are left out; None: as they were found."""
    labels: str
    """Whose indices the labels are: `own` or `imagenet`."""
    classes: list[str]
    """Names of the classes; a label is a place in this list."""
    counts: dict[str, int]
    """Images of each split."""
    shards: dict[str, Entry]
    """Tars by name."""
    indices: dict[str, Entry]
    """Indices by name, one a split."""
    oddities: dict[str, int]
    """Images of each kind that `oddities.csv` lists by name."""
    skipped: dict[str, str]
    """Bad images that were left out, and why."""
    ignored: list[str]
    """Files of the source that are no images, by their suffix."""


def write(
    source: str, out: Path, *, images_per_shard: int, seed: int, labels: str = "own", on_bad_image: str = "error",
    in_process: bool | None = None,
) -> Manifest:
    """Shards whatever lies at `source` into `out`; shards that are there already are only indexed.

    Args:
        on_bad_image: `error` or `skip`.
        in_process: whether this process does it all; None: unless the images are worth starting Ray tasks for.
    Raises: SourceError, ShardError, ClusterError; see `write_shards`.
    """
    found = detect(source)
    if isinstance(found, ExistingShards):
        from pipeline import index  # uses what is above

        return index.index_shards(found.location, out, labels=labels)
    logging.info("%s is %s", source, found.layout)
    return write_shards(
        found.scan(labels), found.root, out, source=source, images_per_shard=images_per_shard, seed=seed,
        labels=labels, on_bad_image=on_bad_image, in_process=in_process,
    )


def write_shards(
    listing: Listing, root: Path, out: Path, *, source: str, images_per_shard: int, seed: int, labels: str = "own",
    on_bad_image: str = "error", in_process: bool | None = None,
) -> Manifest:
    """Writes the images of a listing, whose files lie in `root`, as shards into `out`; JPEGs stay as they are.

    A file appears under its name when it is complete, the manifest last. Nothing waits for the disk to have synced.
    Raises: SourceError for bad images (all of them, after every other shard was written) or a source that changed;
    ShardError if the disk is full or is not the one that the tasks write to.
    """
    root, out = Path(root).absolute(), Path(out).absolute()
    plan = Plan(listing, root, out, images_per_shard=images_per_shard, seed=seed, skip=on_bad_image == "skip")
    (out / RECEIPTS).mkdir(parents=True, exist_ok=True)
    _clear(out, plan)
    _check_space(plan, out)
    total = plan.num_bytes()
    receipts: dict[str, Receipt] = {}
    with progress(f"sharding {out.name}", total) as advance:
        for receipt in cluster.parallel(
            _write_shard, plan.tasks(), in_process=total < _SMALL if in_process is None else in_process
        ):
            receipts[receipt.shard] = receipt
            advance(images=receipt.num_images, num_bytes=receipt.num_bytes)
    bad = {name: reason for receipt in receipts.values() for name, reason in receipt.bad.items()}
    if bad and on_bad_image != "skip":
        raise SourceError(_told(bad))
    shards = {shard: receipts[shard].entry for shard in sorted(receipts)}
    _check_visible(out, shards)
    indices: dict[str, Entry] = {}
    counts = {}
    for split in SPLITS:
        tables = [pq.ParquetFile(_receipt_path(out, shard)).read() for shard in plan.shards(split)]
        table = pa.concat_tables(tables).combine_chunks().replace_schema_metadata(None)
        counts[split] = len(table)
        if not counts[split]:
            raise SourceError(f"no image of {split} is left: all were bad")
        write_index(out, split, table, indices)
    findings = sorted((name, oddity, done) for receipt in receipts.values() for name, oddity, done in receipt.findings)
    with appearing(out / ODDITIES) as path, path.open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["name", "oddity", "done"])
        lines.writerows(findings)
    manifest = Manifest(
        source=source, layout=listing.layout, location=None, seed=seed, images_per_shard=images_per_shard,
        labels=labels, classes=listing.classes, counts=counts, shards=shards, indices=indices,
        oddities=dict(sorted(Counter(oddity for _, oddity, _ in findings).items())),
        skipped=dict(sorted(bad.items())), ignored=listing.ignored,
    )
    write_manifest(out, manifest)
    return manifest


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """The path of a new file beside `path` that takes its name when the block ends well, and else is removed."""
    partial = _partial(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_index(out: Path, split: str, table: pa.Table, indices: dict[str, Entry]) -> None:
    """Writes a split's index, and enters it in `indices`."""
    name = f"{split}.index.parquet"
    with appearing(out / name) as path:
        pq.write_table(table, path)
        indices[name] = {"size": path.stat().st_size, "xxh3": checksum_of(path)}


def write_manifest(out: Path, manifest: Manifest) -> None:
    """Writes `manifest.json`, with which the shards are complete."""
    with appearing(out / "manifest.json") as path:
        path.write_text(f"{json.dumps(asdict(manifest), indent=1)}\n")


@dataclass(frozen=True)
class Task:
    """One shard that is to be written."""

    root: Path
    out: Path
    shard: str
    images: pa.Table
    """Rows of pipeline.sources.IMAGES, in the tar's order, and their `key`."""
    skip: bool
    """Whether bad images are left out, or keep the shard from appearing."""

    def num_bytes(self) -> int:
        """Of the images."""
        return int(self.images["size"].to_numpy().sum())

    def identity(self) -> str:
        """What two shards share if they have the same images, by name, label and size."""
        digest = hashlib.sha256(_RECIPE.encode())
        for column in ("name", "label", "size"):
            digest.update("\n".join(map(str, self.images[column].to_pylist())).encode() + b"\0")
        return digest.hexdigest()


@dataclass(frozen=True)
class Receipt:
    """What came of a shard; kept as notes in a parquet file of the shard's part of the index."""

    shard: str
    identity: str
    entry: Entry
    num_images: int
    num_bytes: int
    """Of all its images, as they were listed."""
    findings: list[Finding]
    bad: dict[str, str]
    """Images that cannot be read, and why."""


class Plan:
    """The shards that a listing becomes. Holds the images as columns: a Task has a copy of its own rows.

    Raises: SourceError for two images with one key.
    """

    def __init__(
        self, listing: Listing, root: Path, out: Path, *, images_per_shard: int, seed: int, skip: bool
    ) -> None:
        self.root, self.out, self.skip = root, out, skip
        self._images: dict[str, pa.Table] = {}
        self._rows: dict[str, np.ndarray] = {}
        for split in SPLITS:
            images = listing.splits[split]
            self._images[split] = images.append_column("key", _keys(images["name"]))
            order = _hashed_order(images["name"], seed) if split == "train" else np.arange(len(images))
            for number, start in enumerate(range(0, len(images), images_per_shard)):
                self._rows[f"{split}-{number:06d}.tar"] = order[start : start + images_per_shard]

    def shards(self, split: str) -> list[str]:
        """Names of a split's shards, in order."""
        return [shard for shard in self._rows if shard.startswith(f"{split}-")]

    def tasks(self) -> Iterator[Task]:
        """What there is to do, shard by shard."""
        for split, images in self._images.items():
            for shard in self.shards(split):
                yield Task(self.root, self.out, shard, images.take(self._rows[shard]).combine_chunks(), self.skip)

    def num_bytes(self) -> int:
        """Of all images."""
        return sum(int(images["size"].to_numpy().sum()) for images in self._images.values())

    def tar_sizes(self) -> dict[str, int]:
        """Bytes of each shard, if no image is bad or of another format."""
        return {
            shard: tar_size(np.append(images["size"].to_numpy()[self._rows[shard]], [1] * len(self._rows[shard])))
            for split, images in self._images.items() for shard in self.shards(split)
        }


def _keys(names: pa.ChunkedArray) -> pa.Array:
    """The key of each image: its name without suffix; further dots become _, as WebDataset ends a key at the first."""
    keys = _replaced(names, r"\.[^./]*$", "").combine_chunks()
    while (undotted := _replaced(keys, r"\.([^./]*)$", r"_\1")) != keys:  # the last dot of a file's name
        keys = undotted
    if len(keys.unique()) < len(keys):
        key, _ = Counter(keys.to_pylist()).most_common(1)[0]
        first, second, *_ = (name for name, of in zip(names.to_pylist(), keys.to_pylist(), strict=True) if of == key)
        raise SourceError(f"{first} and {second} would both have the key {key}: rename one of them")
    return keys


def _replaced(words: Any, pattern: str, by: str) -> Any:
    return pc.call_function("replace_substring_regex", [words], pc.ReplaceSubstringOptions(pattern, by))


def _hashed_order(names: pa.ChunkedArray, seed: int) -> np.ndarray:
    """(num,) int64: the rows in the order of a seeded hash of their names, which are sorted."""
    prefix, hashes = f"{seed}/".encode(), []
    for start in range(0, len(names), _CHUNK):
        chunk = names.slice(start, _CHUNK).to_pylist()
        digests = b"".join(hashlib.blake2b(prefix + name.encode(), digest_size=8).digest() for name in chunk)
        hashes.append(np.frombuffer(digests, ">u8"))
    return np.argsort(np.concatenate(hashes), kind="stable")


def _clear(out: Path, plan: Plan) -> None:
    """Removes what is out of date, the manifest first; shards and receipts of the plan's names may be kept."""
    wanted = {shard for split in SPLITS for shard in plan.shards(split)}
    wanted |= {_receipt_path(out, shard).name for shard in wanted}
    for folder, patterns in (
        (out, ("manifest.json", ODDITIES, "*.partial", *(f"{split}[-.]*" for split in SPLITS))),
        (out / RECEIPTS, ("*",)),
    ):
        for pattern in patterns:
            for path in folder.glob(pattern):
                if path.name not in wanted:
                    path.unlink()


def _check_space(plan: Plan, out: Path) -> None:
    needed = 0
    for shard, size in plan.tar_sizes().items():
        with contextlib.suppress(FileNotFoundError):
            size -= (out / shard).stat().st_size
        needed += max(size, 0)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ShardError(
            f"{out} lacks space: the shards take {needed / 1e6:,.1f} MB more and {free / 1e6:,.1f} MB are free. "
            f"Make room, or make {out} a link to a folder on a larger disk"
        )


def _check_visible(out: Path, shards: dict[str, Entry]) -> None:
    """Raises ShardError if the tasks wrote to other disks than this process sees."""
    for shard, entry in shards.items():
        path = out / shard
        if not path.is_file() or path.stat().st_size != entry["size"]:
            raise ShardError(
                f"{path} was written by another node and cannot be seen from here: "
                f"{out} must be a folder, or a link to one, that all nodes of the cluster share"
            )


def _told(bad: dict[str, str]) -> str:
    lines = [f"{name}: {bad[name]}" for name in sorted(bad)]
    if len(lines) > _NAMED:
        lines[_NAMED:] = [f"... and {len(lines) - _NAMED} more"]
    return "\n  ".join([
        f"{len(bad)} of the images cannot be read:", *lines,
        "replace or remove them, or set data.on_bad_image to skip; shards without a bad image are kept",
    ])


def _write_shard(task: Task) -> Receipt:
    """Writes a shard and its receipt, unless they are there; with bad images that are not to be skipped, neither."""
    if kept := _kept(task):
        return kept
    path, receipt_path = task.out / task.shard, _receipt_path(task.out, task.shard)
    receipt_path.unlink(missing_ok=True)
    partial = _partial(path)
    try:
        with quick_headers(), Tar(partial) as tar, Reader(task.root) as reader:
            rows, findings, bad = _gather(task, reader, tar)
            digest = tar.finish()
        receipt = Receipt(task.shard, task.identity(), {"size": tar.size, "xxh3": digest}, len(rows), task.num_bytes(),
                          findings, bad)
        if bad and not task.skip:
            return receipt
        os.replace(partial, path)
    except OSError as error:
        raise ShardError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
    keys, *numbers = zip(*rows, strict=True) if rows else [()] * 4
    table = pa.table([keys, [task.shard] * len(rows), *numbers], schema=INDEX)
    with appearing(receipt_path) as file:
        pq.write_table(table.replace_schema_metadata({_NOTES: json.dumps(asdict(receipt))}), file)
    return receipt


def _gather(task: Task, reader: Reader, tar: Tar) -> tuple[list[Row], list[Finding], dict[str, str]]:
    """Fills the tar; the index's rows but for the shard's name, what was odd, and which images are bad."""
    rows: list[Row] = []
    findings: list[Finding] = []
    bad: dict[str, str] = {}
    columns = {name: column.to_pylist() for name, column in zip(task.images.column_names, task.images, strict=True)}
    places = [Place(*values) for values in zip(*(columns[name] for name in Place._fields), strict=True)]
    for name, key, label, place in zip(
        columns["name"], columns["key"], columns["label"], reader.ahead(places), strict=True
    ):
        content = tar.room(place.size)
        reader.read(place, content)
        try:
            odd = jpeg.inspect(content)
        except jpeg.BadImage as error:
            bad[name] = str(error)
            findings.append((name, str(error), jpeg.LEFT_OUT))
            continue
        if odd:
            findings += [(name, oddity, jpeg.ENCODED if odd.jpeg else jpeg.KEPT) for oddity in odd.oddities]
            content = odd.jpeg or content
        try:
            offset = tar.add(f"{key}.jpg", content)
            tar.add(f"{key}.cls", str(label).encode())
        except ValueError:
            raise SourceError(f"{name}: too long a name for a tar; folder and file may have 100 characters") from None
        rows.append((key, offset, len(content), label))
    return rows, findings, bad


def _kept(task: Task) -> Receipt | None:
    """The receipt of a shard that is there, has the same images, and is undamaged."""
    path = task.out / task.shard
    try:
        notes = pq.read_schema(_receipt_path(task.out, task.shard)).metadata[_NOTES]
        receipt = Receipt(**json.loads(notes))
        if receipt.identity != task.identity() or (receipt.bad and not task.skip):
            return None
        unchanged = path.stat().st_size == receipt.entry["size"] and checksum_of(path) == receipt.entry["xxh3"]
        return receipt if unchanged else None
    except (OSError, ValueError, TypeError, KeyError):  # none there, or an unreadable one
        return None


def _receipt_path(out: Path, shard: str) -> Path:
    return out / RECEIPTS / f"{shard}.parquet"


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
