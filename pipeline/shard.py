"""Writing shards: WebDataset tars with an index of where each JPEG lies, byte for byte a function of the source.

A folder of shards holds `train-000000.tar ...`, `val-000000.tar ...` (`<key>.jpg`, then `<key>.cls`, the label in
digits), `{train,val}.index.parquet` (key, shard, offset, size, label; a row an image, in the tars' order) and
`manifest.json`. Validation images lie in sorted order, training images in the order of a seeded hash of their
names, so that plain streaming readers see mixed classes too.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track

from pipeline.data import ShardError, Shards, remedy

SPLITS = ("train", "val")
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
JPEG_QUALITY = 95
_READERS = 8  # threads that read the source ahead of the writer
_TAR_HEADER = 512  # bytes: USTAR has one block before each file

_INDEX = pa.schema([
    ("key", pa.string()), ("shard", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("label", pa.int64()),
])


class SourceError(ValueError):
    """The folder of images cannot be sharded; the message names the file or folder and what is wrong with it."""


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
    shards: dict[str, dict[str, str | int]]
    """Tars: name -> size in bytes and sha256."""
    indices: dict[str, dict[str, str | int]]
    """Indices, one a split: name -> size in bytes and sha256."""
    reencoded: list[str]
    """Images of the source that were no JPEG, and were encoded as one."""
    skipped: list[str]
    """Files of the source that are no images, by their suffix."""


@dataclass(frozen=True)
class _Item:
    path: Path
    name: str  # relative to the source, with slashes
    key: str
    label: int


def write_shards(source: Path, out: Path, *, images_per_shard: int, seed: int) -> Manifest:
    """Shards the folder tree `{train,val}/<class>/*`; JPEGs are copied as they are.

    Every file appears under its name when it is complete, the manifest last.
    Raises: SourceError for a folder of another shape, or an image that cannot be read.
    """
    splits, classes, skipped = _scan(Path(source))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for stale in (*out.glob("*.tar"), *out.glob("*.partial"), out / "manifest.json"):
        stale.unlink(missing_ok=True)
    splits["train"].sort(key=lambda item: hashlib.blake2b(f"{seed}/{item.name}".encode()).digest())
    shards: dict[str, dict[str, str | int]] = {}
    indices: dict[str, dict[str, str | int]] = {}
    reencoded: list[str] = []
    with ThreadPoolExecutor(_READERS) as readers:
        for split, items in splits.items():
            parts = [items[start : start + images_per_shard] for start in range(0, len(items), images_per_shard)]
            rows: list[dict[str, str | int]] = []
            for number, part in enumerate(_progress(parts, f"sharding {split}")):
                name = f"{split}-{number:06d}.tar"
                images = zip(part, readers.map(_read, part), strict=True)
                shards[name] = _write(out / name, lambda file, name=name, images=images: rows.extend(
                    _write_tar(file, name, images, reencoded)))
            table = pa.Table.from_pylist(rows, schema=_INDEX)
            indices[f"{split}.index.parquet"] = _write(
                out / f"{split}.index.parquet", lambda file, table=table: pq.write_table(table, file))
    manifest = Manifest(
        source=Path(source).as_posix(), seed=seed, images_per_shard=images_per_shard, classes=classes,
        counts={split: len(items) for split, items in splits.items()},
        shards=shards, indices=indices, reencoded=sorted(reencoded), skipped=skipped,
    )
    text = json.dumps(asdict(manifest), indent=1) + "\n"
    _write(out / "manifest.json", lambda file: file.write(text.encode()))
    return manifest


def verify(folder: Path | str) -> None:
    """Compares every file with the manifest's hash.

    Raises: ShardError, naming the first file that differs.
    """
    shards = Shards(folder)
    paths = [shards.folder / name for name in shards.files]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, digest in zip(paths, pool.map(_sha256, paths), strict=True):
            if digest != shards.files[path.name]["sha256"]:
                raise ShardError(f"{path} does not match its manifest: its contents changed: {remedy(path)}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _scan(source: Path) -> tuple[dict[str, list[_Item]], list[str], list[str]]:
    """The images of each split in sorted order, the classes, and what is no image."""
    for split in SPLITS:
        if not (source / split).is_dir():
            raise SourceError(f"{source / split} not found: the images must lie in {source}/{{train,val}}/<class>/")
    classes = sorted(entry.name for entry in os.scandir(source / "train") if entry.is_dir())
    splits: dict[str, list[_Item]] = {}
    skipped: list[str] = []
    for split in SPLITS:
        items: dict[str, _Item] = {}
        for folder in sorted(os.scandir(source / split), key=lambda entry: entry.name):
            if not folder.is_dir():
                skipped.append(f"{split}/{folder.name}")
                continue
            if folder.name not in classes:
                raise SourceError(f"{folder.path}: there is no class {folder.name!r} in {source / 'train'}")
            label = classes.index(folder.name)
            for file_name in sorted(os.listdir(folder.path)):
                name = f"{split}/{folder.name}/{file_name}"
                stem, suffix = os.path.splitext(name)
                if suffix.lower() not in IMAGE_SUFFIXES:
                    skipped.append(name)
                    continue
                # WebDataset ends a key at the first dot of the file's name.
                key = f"{split}/{folder.name}/{os.path.basename(stem).replace('.', '_')}"
                if key in items:
                    raise SourceError(f"{name} and {items[key].name} would both be called {key}: rename one")
                items[key] = _Item(source / name, name, key, label)
        if not items:
            raise SourceError(f"no images in {source / split}: they must lie in {source / split}/<class>/")
        splits[split] = list(items.values())
    return splits, classes, skipped


def _read(item: _Item) -> tuple[bytes, bool]:
    """The image as JPEG, and whether it had to be encoded as one.

    The header of every JPEG is read; one without an end marker is decoded, which tells a cut file.
    """
    content = item.path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.format == "JPEG":
                if b"\xff\xd9" not in content[-64:]:
                    image.load()
                return content, False
            encoded = io.BytesIO()
            image.convert("RGB").save(encoded, "JPEG", quality=JPEG_QUALITY)
            return encoded.getvalue(), True
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise SourceError(f"{item.path} cannot be read as an image ({error}): replace or remove it") from None


def _write_tar(
    file: io.BufferedWriter, shard: str, images: Iterable[tuple[_Item, tuple[bytes, bool]]], reencoded: list[str]
) -> Iterator[dict[str, str | int]]:
    """Writes a tar and yields the index's rows."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for item, (jpeg, was_encoded) in images:
            if was_encoded:
                reencoded.append(item.name)
            yield {"key": item.key, "shard": shard, "offset": tar.offset + _TAR_HEADER, "size": len(jpeg),
                   "label": item.label}
            for suffix, content in (("jpg", jpeg), ("cls", str(item.label).encode())):
                header = tarfile.TarInfo(f"{item.key}.{suffix}")  # uid, gid and mtime are 0, the mode 0644
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))


class _HashedFile(io.FileIO):
    def __init__(self, path: Path) -> None:
        super().__init__(path, "wb")
        self.sha256 = hashlib.sha256()

    def write(self, data, /) -> int:
        num_bytes = super().write(data)
        self.sha256.update(memoryview(data)[:num_bytes])
        return num_bytes


def _write(path: Path, write: Callable[[io.BufferedWriter], object]) -> dict[str, str | int]:
    """Writes a file under a temporary name and renames it; its size and sha256."""
    partial = path.with_name(f"{path.name}.partial")
    raw = _HashedFile(partial)
    with io.BufferedWriter(raw, 1 << 20) as file:
        write(file)
        file.flush()
        os.fsync(raw.fileno())
    os.replace(partial, path)
    return {"size": path.stat().st_size, "sha256": raw.sha256.hexdigest()}


def _progress(parts: list[list[_Item]], description: str) -> Iterable[list[_Item]]:
    return track(parts, description, console=Console(stderr=True), disable=not sys.stderr.isatty())
