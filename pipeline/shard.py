"""Writing shards: WebDataset tars and an index of where each JPEG lies, the same bytes for the same source.

A folder of shards holds `train-000000.tar ...`, `val-000000.tar ...` (`<key>.jpg`, then `<key>.cls`, the
label as a number), `{train,val}.index.parquet` (a row an image, in the tars' order) and `manifest.json`.
Validation images lie in sorted order, training images in the order of a seeded hash of their names, so that
readers that only stream see mixed classes too.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track

from pipeline.data import Shards
from pipeline.store import DAMAGED, ShardError

SPLITS = ("train", "val")
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
JPEG_QUALITY = 95
INDEX = pa.schema([
    ("key", pa.string()),
    ("shard", pa.string()),  # name of the tar
    ("offset", pa.int64()),  # of the JPEG's first byte in the tar
    ("size", pa.int64()),  # of the JPEG, in bytes
    ("label", pa.int64()),
])
_READERS = 8  # threads that read the source ahead of the writer
_TAR_HEADER = 512  # bytes: USTAR has one block before each file

Entry = dict[str, str | int]
"""Size in bytes, and sha256, of a file."""


class SourceError(ValueError):
    """The folder of images cannot be sharded; the message names the file or folder and what is wrong."""


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds; `manifest.json` is this, field by field."""

    source: str
    """Folder that was sharded."""
    seed: int
    """Seed of the training images' order."""
    images_per_shard: int
    """Images in each tar but a split's last."""
    classes: list[str]
    """Names of the classes; a label is a place in this list."""
    counts: dict[str, int]
    """Images of each split."""
    shards: dict[str, Entry]
    """Tars by name."""
    indices: dict[str, Entry]
    """Indices by name, one a split."""
    reencoded: list[str]
    """Images of the source that were no JPEG, and were encoded as one."""
    skipped: list[str]
    """Files of the source that are no images, by their suffix."""


@dataclass(frozen=True, slots=True)
class _Image:
    name: str  # path relative to the source, with slashes
    key: str
    label: int


def write_shards(source: Path, out: Path, *, images_per_shard: int, seed: int) -> Manifest:
    """Shards the folder tree `{train,val}/<class>/*` into `out`; JPEGs are copied as they are.

    Every file appears under its name when it is complete, the manifest last.
    Raises: SourceError for a folder of another shape, or an image that cannot be read.
    """
    source, out = Path(source), Path(out)
    splits, classes, skipped = _scan(source)
    splits["train"].sort(key=lambda image: hashlib.blake2b(f"{seed}/{image.name}".encode()).digest())
    out.mkdir(parents=True, exist_ok=True)
    _clear(out)
    shards: dict[str, Entry] = {}
    indices: dict[str, Entry] = {}
    reencoded: list[str] = []
    with ThreadPoolExecutor(_READERS) as readers:
        for split, images in splits.items():
            tables = []
            for number, start in enumerate(_progress(range(0, len(images), images_per_shard), split)):
                part = images[start : start + images_per_shard]
                contents = readers.map(lambda image: _read(source / image.name), part)
                shard = f"{split}-{number:06d}.tar"
                with _appearing(out / shard, shards) as file:
                    rows, others = _write_tar(file, zip(part, contents, strict=True))
                tables.append(pa.Table.from_pylist([{"shard": shard, **row} for row in rows], schema=INDEX))
                reencoded += others
            with _appearing(out / f"{split}.index.parquet", indices) as file:
                pq.write_table(pa.concat_tables(tables).combine_chunks(), file)
    manifest = Manifest(
        source=source.as_posix(), seed=seed, images_per_shard=images_per_shard, classes=classes,
        counts={split: len(images) for split, images in splits.items()},
        shards=shards, indices=indices, reencoded=sorted(reencoded), skipped=skipped,
    )
    with _appearing(out / "manifest.json", {}) as file:
        file.write(f"{json.dumps(asdict(manifest), indent=1)}\n".encode())
    return manifest


def verify(folder: Path | str) -> None:
    """Compares every file with the manifest's hash (1.4 GB/s on one core here).

    Raises: ShardError, naming the first file that differs.
    """
    shards = Shards(folder)
    files = shards.manifest["shards"] | shards.manifest["indices"]
    paths = [shards.folder / name for name in files]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, digest in zip(paths, pool.map(_sha256, paths), strict=True):
            if digest != files[path.name]["sha256"]:
                raise ShardError(f"{path} does not match its manifest, its contents differ: {DAMAGED}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _scan(source: Path) -> tuple[dict[str, list[_Image]], list[str], list[str]]:
    """The images of each split in sorted order, the classes, and the names of what is no image."""
    for split in SPLITS:
        if not (source / split).is_dir():
            raise SourceError(f"{source / split} not found: images must lie in {source / split}/<class>/")
    classes = sorted(name for name in os.listdir(source / "train") if (source / "train" / name).is_dir())
    splits: dict[str, list[_Image]] = {}
    skipped: list[str] = []
    for split in SPLITS:
        images: dict[str, _Image] = {}
        for folder in sorted(os.listdir(source / split)):
            if not (source / split / folder).is_dir():
                skipped.append(f"{split}/{folder}")
                continue
            if folder not in classes:
                raise SourceError(f"{source / split / folder}: there is no such class in {source / 'train'}")
            label = classes.index(folder)
            for file in sorted(os.listdir(source / split / folder)):
                name = f"{split}/{folder}/{file}"
                stem, suffix = os.path.splitext(file)
                if suffix.lower() not in IMAGE_SUFFIXES:
                    skipped.append(name)
                    continue
                # For WebDataset a key ends at the first dot of the file's name.
                key = f"{split}/{folder}/{stem.replace('.', '_')}"
                if key in images:
                    raise SourceError(f"{source / name}: {images[key].name} has the key {key} too: rename")
                images[key] = _Image(name, key, label)
        if not images:
            raise SourceError(f"no images in {source / split}: they must lie in {source / split}/<class>/")
        splits[split] = list(images.values())
    return splits, classes, skipped


def _clear(out: Path) -> None:
    """Removes the files of an earlier writing, the manifest first."""
    for pattern in ("manifest.json", "*.partial", *(f"{split}[-.]*" for split in SPLITS)):
        for path in out.glob(pattern):
            path.unlink()


def _read(path: Path) -> tuple[bytes, bool]:
    """The image as a JPEG, and whether it had to be encoded as one.

    Of a JPEG the header is read; one without an end marker is decoded too, as it may have been cut.
    """
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.format == "JPEG":
                if b"\xff\xd9" not in content[-64:]:
                    image.load()
                return content, False
            encoded = io.BytesIO()
            image.convert("RGB").save(encoded, "JPEG", quality=JPEG_QUALITY)
            return encoded.getvalue(), True
    except UnidentifiedImageError:
        raise SourceError(f"{path} is not an image: replace or remove it") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SourceError(f"{path} cannot be read ({error}): replace or remove it") from None


def _write_tar(
    file: BinaryIO, images: Iterable[tuple[_Image, tuple[bytes, bool]]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Writes a tar; the index's rows without the shard's name, and the names of what was encoded."""
    rows, reencoded = [], []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for image, (jpeg, was_encoded) in images:
            offset = tar.offset + _TAR_HEADER
            rows.append({"key": image.key, "offset": offset, "size": len(jpeg), "label": image.label})
            if was_encoded:
                reencoded.append(image.name)
            for suffix, content in (("jpg", jpeg), ("cls", str(image.label).encode())):
                header = tarfile.TarInfo(f"{image.key}.{suffix}")  # uid, gid and mtime are 0, the mode 0644
                header.size = len(content)
                try:
                    tar.addfile(header, io.BytesIO(content))
                except ValueError:
                    raise SourceError(f"{image.name}: too long a name for a tar (100 characters)") from None
    return rows, reencoded


class _HashedFile(io.FileIO):
    """A new file that hashes what is written to it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "wb")
        self.sha256 = hashlib.sha256()

    def write(self, data, /) -> int:
        num_bytes = super().write(data)
        self.sha256.update(memoryview(data)[:num_bytes])
        return num_bytes


@contextmanager
def _appearing(path: Path, entries: dict[str, Entry]) -> Iterator[BinaryIO]:
    """A file that appears under its name, and in `entries` with size and hash, when the block ends well."""
    partial = path.with_name(f"{path.name}.partial")
    raw = _HashedFile(partial)
    with io.BufferedWriter(raw, 1 << 20) as file:
        yield cast(BinaryIO, file)
        file.flush()
        os.fsync(raw.fileno())
    os.replace(partial, path)
    entries[path.name] = {"size": path.stat().st_size, "sha256": raw.sha256.hexdigest()}


def _progress(starts: range, split: str) -> Iterable[int]:
    console = Console(stderr=True)
    return track(starts, f"sharding {split}", console=console, disable=not sys.stderr.isatty())
