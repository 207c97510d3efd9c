"""Stores: read access to the bytes of shards in a local folder or at an fsspec URL.

A store holds the names, sizes and checksums of the shards of one manifest. It can be pickled and forked at any time:
each process opens its own file descriptors and connections on its first read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipeline.base.errors import ShardError
from pipeline.shards.open_files import OpenFiles

CHUNK_BYTES = 8 << 20  # size of the chunks in which a whole shard is read

VERIFY_HINT = "`make verify` lists all damaged files and says what to do"

FileEntries = Mapping[str, Mapping[str, Any]]
"""Maps the name of a tar to its `size` in bytes and its checksum `xxh3`."""


class ByteRange(NamedTuple):
    """Bytes `offset` to `offset + size` of a shard."""

    shard: str
    offset: int
    size: int


class Store(Protocol):
    """Reads bytes of shards by name. Every method raises ShardError with the shard, the expected and the actual
    value."""

    def location_of(self, shard: str) -> str:
        """Returns the path or URL of a shard, for messages."""
        ...

    def check(self) -> None:
        """Checks that every shard exists and has the right size. Does not read the contents."""
        ...

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Returns exactly `size` bytes, starting at byte `offset`."""
        ...

    def read_many(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """Reads several ranges. Over a network they are requested concurrently."""
        ...

    def stream(self, shard: str) -> Iterator[bytes]:
        """Yields the whole shard in chunks."""
        ...


def is_url(location: Path | str) -> bool:
    """Whether the location is an fsspec URL rather than a folder on this machine."""
    return "://" in str(location)


def compare_sizes(shards: FileEntries, sizes: Mapping[str, int], location: str) -> None:
    """Raises ShardError for the first shard that is missing or has the wrong size."""
    for name, entry in shards.items():
        if name not in sizes:
            raise ShardError(f"{location}/{name} is in the manifest but missing: {VERIFY_HINT}")
        if sizes[name] != entry["size"]:
            found = f"{sizes[name]} bytes, not {entry['size']}"
            raise ShardError(f"{location}/{name} does not match its manifest ({found}): {VERIFY_HINT}")


def truncated_error(location: str, part: ByteRange, num_found: int) -> ShardError:
    """Returns the error for a shard that ends before the given range."""
    _, offset, size = part
    return ShardError(
        f"{location} is truncated: expected {size} bytes from byte {offset} on, found {num_found}: {VERIFY_HINT}"
    )


def list_folder(folder: Path) -> dict[str, int]:
    """Returns the names and sizes in bytes of the files in a folder. Raises: ShardError if it cannot be listed."""
    try:
        with os.scandir(folder) as files:
            return {file.name: file.stat().st_size for file in files if file.is_file()}
    except OSError as error:
        raise ShardError(f"{folder} cannot be listed: {error.strerror}") from None


class LocalStore:
    """Shards in a folder. Files stay open after the first read, up to a limit (pipeline/shards/open_files.py)."""

    def __init__(self, folder: Path, shards: FileEntries) -> None:
        self.folder, self.shards = folder, shards
        self._files: OpenFiles | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_files": None}

    def location_of(self, shard: str) -> str:
        return str(self.folder / shard)

    def check(self) -> None:
        compare_sizes(self.shards, list_folder(self.folder), str(self.folder))

    def read(self, shard: str, offset: int, size: int) -> bytes:
        content = self._pread(shard, size, offset)
        if len(content) != size:
            raise truncated_error(self.location_of(shard), ByteRange(shard, offset, size), len(content))
        return content

    def read_many(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        return [self.read(*part) for part in ranges]

    def stream(self, shard: str) -> Iterator[bytes]:
        offset = 0
        while content := self._pread(shard, CHUNK_BYTES, offset):
            yield content
            offset += len(content)

    def _pread(self, shard: str, size: int, offset: int) -> bytes:
        if self._files is None:
            self._files = OpenFiles(len(self.shards))
        try:
            return self._files.read(self.folder / shard, offset, size)
        except OSError as error:
            raise ShardError(f"{self.location_of(shard)} cannot be read ({error.strerror}): {VERIFY_HINT}") from None
