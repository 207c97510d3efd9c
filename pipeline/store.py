"""Where tars lie: a folder on this machine, or any URL that fsspec reads, through copies on the node.

A store knows the shards of one manifest, name -> size and checksum, and gives bytes of them. It can be pickled and
forked at any time: descriptors and connections are opened by the process that reads, on its first read.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

CHUNK = 8 << 20  # bytes: a whole shard is read in pieces of this size
DAMAGED = "`make verify` lists all that is damaged and says what to do"

Entries = Mapping[str, Mapping[str, Any]]
"""Name of a tar -> its `size` in bytes and its `xxh3`."""


class ShardError(ValueError):
    """A shard, an index or the manifest is missing or altered; the message says which, and what to do."""


class Part(NamedTuple):
    """Bytes `offset` to `offset + size` of a shard."""

    shard: str
    offset: int
    size: int


class Store(Protocol):
    """Bytes of shards by name. Every method raises ShardError, naming the shard, what is expected and what is found."""

    def where(self, shard: str) -> str:
        """The path or URL of a shard, for people."""
        ...

    def check(self) -> None:
        """Every shard is there with its size; contents are not read."""
        ...

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes."""
        ...

    def read_all(self, parts: Sequence[Part]) -> list[bytes]:
        """What `read` gives for each part; over a network they are under way together."""
        ...

    def stream(self, shard: str) -> Iterator[bytes]:
        """The whole shard from its first byte on, in pieces."""
        ...


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """`manifest.json` of a folder of shards. Raises: ShardError if there is none, or it cannot be read."""
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise ShardError(f"{path} not found: run `dvc repro shard` to write the shards") from None
    except ValueError:
        raise ShardError(f"{path} is not valid JSON: run `dvc repro --force shard` to write it again") from None
    if not {"location", "shards", "indices", "classes", "counts"} <= manifest.keys():
        raise ShardError(f"{path} is of another version of flopeq: run `dvc repro --force shard` to write it again")
    return manifest


def tars_at(folder: Path, manifest: Mapping[str, Any]) -> Path | str:
    """Where the tars of a manifest lie that is in a folder: beside it, or at its `location`, a folder or URL."""
    location = manifest["location"] or "."
    return location if is_url(location) else folder / location


def open_store(location: Path | str, shards: Entries, *, cache_gib: float = 0, cache: Path | None = None) -> Store:
    """The store of the shards at a folder or an fsspec URL; opens nothing yet.

    Args:
        cache_gib: bound of a node's copies of shards at a URL, in GiB; 0: none are made.
        cache: folder of those copies; None: one of this user's in the machine's folder for temporary files (TMPDIR).
    """
    if not is_url(location):
        return LocalStore(Path(location), shards)
    from pipeline.remote import RemoteStore

    cache = cache or Path(tempfile.gettempdir()) / f"flopeq-{os.getuid()}"
    return RemoteStore(str(location), shards, cache_bytes=int(cache_gib * 2**30), cache=cache)


def is_url(location: Path | str) -> bool:
    """Whether the location is an fsspec URL rather than a folder on this machine."""
    return "://" in str(location)


def find(location: Path | str) -> dict[str, int]:
    """Names and sizes in bytes of the files directly in a folder or at an fsspec URL, by one listing.

    Raises: ShardError if there is no such place or it cannot be listed.
    """
    if is_url(location):
        from pipeline import remote

        return remote.find(str(location))
    try:
        with os.scandir(location) as files:
            return {file.name: file.stat().st_size for file in files if file.is_file()}
    except OSError as error:
        raise ShardError(f"{location} cannot be listed: {error.strerror}") from None


def compare(shards: Entries, sizes: Mapping[str, int], location: str) -> None:
    """Raises ShardError for the first shard that is not there or has another size."""
    for name, entry in shards.items():
        if name not in sizes:
            raise ShardError(f"{location}/{name} is in the manifest but missing: {DAMAGED}")
        if sizes[name] != entry["size"]:
            found = f"{sizes[name]} bytes, not {entry['size']}"
            raise ShardError(f"{location}/{name} does not match its manifest ({found}): {DAMAGED}")


def short(where: str, part: Part, found: int) -> ShardError:
    """The error for a shard that ends before a part of it does."""
    _, offset, size = part
    return ShardError(
        f"{where} is cut off: {size} bytes are expected from byte {offset} on, {found} were found: {DAMAGED}"
    )


class LocalStore:
    """Shards in a folder, read from descriptors that stay open."""

    def __init__(self, folder: Path, shards: Entries) -> None:
        self.folder, self.shards = folder, shards
        self._descriptors: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_descriptors": {}}

    def __del__(self) -> None:
        for descriptor in self.__dict__.pop("_descriptors", {}).values():
            os.close(descriptor)

    def where(self, shard: str) -> str:
        return str(self.folder / shard)

    def check(self) -> None:
        compare(self.shards, find(self.folder), str(self.folder))

    def read(self, shard: str, offset: int, size: int) -> bytes:
        content = self._pread(shard, size, offset)
        if len(content) != size:
            raise short(self.where(shard), Part(shard, offset, size), len(content))
        return content

    def read_all(self, parts: Sequence[Part]) -> list[bytes]:
        return [self.read(*part) for part in parts]

    def stream(self, shard: str) -> Iterator[bytes]:
        offset = 0
        while content := self._pread(shard, CHUNK, offset):
            yield content
            offset += len(content)

    def _pread(self, shard: str, size: int, offset: int) -> bytes:
        descriptor = self._descriptors[shard] if shard in self._descriptors else self._open(shard)
        try:
            return os.pread(descriptor, size, offset)
        except OSError as error:
            raise ShardError(f"{self.where(shard)} cannot be read ({error.strerror}): {DAMAGED}") from None

    def _open(self, shard: str) -> int:
        if not self._descriptors:
            allow_open_files(len(self.shards))
        try:
            self._descriptors[shard] = os.open(self.folder / shard, os.O_RDONLY)
        except OSError as error:
            raise ShardError(f"{self.where(shard)} cannot be opened ({error.strerror}): {DAMAGED}") from None
        return self._descriptors[shard]


def allow_open_files(number: int) -> None:
    """Raises this process's limit of open files, commonly 1,024, as ImageNet has as many shards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < number + 512:
        with contextlib.suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(number + 512, hard), hard))
