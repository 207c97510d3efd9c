"""Scans a WebDataset tar for samples in one pass over its bytes."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, cast

import pyarrow as pa

from pipeline.base.errors import ShardError
from pipeline.base.files import new_checksum
from pipeline.base.imagenet import WNID_PATTERN
from pipeline.base.images import IMAGE_SUFFIXES
from pipeline.shards.store import Store

IMAGE_EXTENSIONS = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
"""File extensions of images. A sample has exactly one image."""

SAMPLES_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),  # of the first byte of the image in the tar, in bytes
        ("size", pa.int64()),  # of the image, in bytes
        ("number", pa.int64()),  # of its class, or null
        ("name", pa.string()),  # of its class, or null; the wnid if there is one
    ]
)

_CLASS_FIELDS = ("wnid", "synset", "class_name", "class")
"""Fields of a sample's `.json` that may hold the name of its class."""

_WNID = re.compile(rf"(?<![A-Za-z0-9]){WNID_PATTERN.pattern}(?!\d)")


class TarScan(NamedTuple):
    """Result of scanning a tar."""

    shard: str
    size: int
    """Size of the tar in bytes."""
    xxh3: str
    """Checksum of the tar."""
    samples: pa.Table
    """One row per sample, with SAMPLES_SCHEMA."""


def scan_tar(store: Store, shard: str) -> TarScan:
    """Reads a tar once from start to end. The standard library parses the headers.

    A sample is a series of consecutive files with the same key. As in webdataset, the key ends at the first dot of the
    file name.
    Raises: ShardError if the tar is truncated or altered, or if a sample does not have one image and one class.
    """
    reader = _ChunkReader(store.stream(shard))
    rows = []
    files: dict[str, Any] = {}
    key = None
    try:
        for member in _iter_members(reader):
            member_key, extension = _split_key(member.name)
            if not member.isreg() or extension not in IMAGE_EXTENSIONS | {"cls", "json"}:
                continue
            if member_key != key:
                rows += [_sample_row(key, files)] if key is not None else []
                key, files = member_key, {}
            if extension in files:
                raise _BadSampleError(f"{key} has two files .{extension}")
            location = member.offset_data, member.size
            files[extension] = location if extension in IMAGE_EXTENSIONS else reader.read(member.size)
        rows += [_sample_row(key, files)] if key is not None else []
    except tarfile.TarError as error:
        raise ShardError(
            f"{store.location_of(shard)} is truncated or altered near byte {reader.position}: {error}"
        ) from None
    except _BadSampleError as error:
        raise ShardError(f"{store.location_of(shard)}: {error}") from None
    columns = zip(*rows, strict=True) if rows else [[] for _ in SAMPLES_SCHEMA]
    samples = pa.table(
        [pa.array(column, kind.type) for column, kind in zip(columns, SAMPLES_SCHEMA, strict=True)], SAMPLES_SCHEMA
    )
    return TarScan(shard, reader.position, reader.digest.hexdigest(), samples)


class _BadSampleError(ValueError):
    """A sample does not consist of one image and its class."""


def _iter_members(reader: _ChunkReader) -> Iterator[tarfile.TarInfo]:
    """Yields all members and then checks the end of the tar. tarfile takes a damaged header for the end.

    Raises: tarfile.TarError if the members are not followed by at least two blocks of zeros and nothing else.
    """
    with tarfile.TarFile(fileobj=cast(IO[bytes], reader)) as tar:
        while member := tar.next():
            cast(Any, tar).members.clear()  # tarfile keeps all members otherwise
            yield member
        last, end = reader.last_read, tar.offset
        if len(last) < tarfile.BLOCKSIZE or last.strip(b"\0") or not reader.only_zeros_follow():
            raise tarfile.TarError("expected the header of a file or the end of the tar")
        if reader.position < end + 2 * tarfile.BLOCKSIZE:
            raise tarfile.TarError("the end of the tar is incomplete")


class _ChunkReader:
    """A forward-only file for tarfile, made from an iterator of chunks. Computes the checksum of all bytes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.digest = new_checksum()
        self.position = 0
        self.last_read = b""
        """Result of the last call of `read`."""
        self._chunks = chunks
        self._chunk = memoryview(b"")
        self._used = 0

    def tell(self) -> int:
        return self.position

    def read(self, size: int) -> bytes:
        parts = []
        while size and (part := self._read_chunk(size)):
            parts.append(part)
            size -= len(part)
        self.last_read = b"".join(parts)
        return self.last_read

    def seek(self, position: int) -> int:
        while position > self.position and self._read_chunk(position - self.position):
            pass
        return self.position

    def only_zeros_follow(self) -> bool:
        """Reads the rest of the tar. Returns whether it contains only zeros."""
        zeros = True
        while part := self._read_chunk(tarfile.RECORDSIZE):
            zeros = zeros and not bytes(part).strip(b"\0")
        return zeros

    def _read_chunk(self, max_bytes: int) -> memoryview:
        if self._used == len(self._chunk):
            content = next(self._chunks, b"")
            self.digest.update(content)
            self._chunk, self._used = memoryview(content), 0
        part = self._chunk[self._used : self._used + max_bytes]
        self._used += len(part)
        self.position += len(part)
        return part


def _split_key(name: str) -> tuple[str, str]:
    """Returns the key with its folders, and the extension in lower case, which is empty for a file outside of
    samples."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower() if stem else ""


def _sample_row(key: str, files: dict[str, Any]) -> tuple[str, int, int, int | None, str | None]:
    images = [files[extension] for extension in IMAGE_EXTENSIONS & files.keys()]
    if len(images) != 1:
        raise _BadSampleError(f"{key} has {len(images) or 'no'} images, among the files .{', .'.join(sorted(files))}")
    try:
        metadata = json.loads(files.get("json", b"{}"))
        text = files.get("cls", b"").decode().strip()
    except ValueError as error:
        raise _BadSampleError(f"{key} has a .cls or .json that cannot be read: {error}") from None
    metadata = metadata if isinstance(metadata, dict) else {}
    number, names = None, [str(metadata[field]) for field in _CLASS_FIELDS if metadata.get(field)]
    for label in (text, metadata.get("label")):
        if label is None or label == "":
            continue
        if not re.fullmatch(r"\d+", str(label)):
            names.append(str(label))
        elif number is None:
            number = int(label)
        elif number != int(label):
            raise _BadSampleError(f"{key} has the label {number} in its .cls and {label} in its .json")
    wnid = next(filter(None, map(_WNID.search, (*names, str(metadata.get("filename", "")), key))), None)
    name = wnid.group() if wnid else names[0] if names else None
    if number is None and name is None:
        raise _BadSampleError(f"{key} has no class: a .cls, a label in its .json, or a wnid in its name is needed")
    return key, *images[0], number, name
