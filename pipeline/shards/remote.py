"""Shards at an fsspec URL, read from the node-local cache if possible and otherwise by range reads."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.base.errors import ShardError
from pipeline.shards.cache import CacheFiller, ShardCache
from pipeline.shards.store import CHUNK_BYTES, VERIFY_HINT, ByteRange, FileEntries, compare_sizes, truncated_error

_log = logging.getLogger(__name__)

_RETRY_AFTER_S = (0.2, 1.0, 4.0)

_MAX_PARALLEL_CHUNKS = 4  # chunks of one shard in flight: a single S3 stream reaches about 80 MB/s


def open_fsspec(location: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a URL and the path in it.

    Raises: ShardError if fsspec does not support the URL, or if a package is missing, with its name.
    """
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    for logger_name in ("aiobotocore", "botocore"):  # at INFO, every process logs location_of it found credentials
        logging.getLogger(logger_name).setLevel(logging.WARNING)
    protocol = location.partition("://")[0]
    try:
        return url_to_fs(location)
    except ImportError as error:
        module = known_implementations.get(protocol, {}).get("class", protocol).partition(".")[0]
        raise ShardError(f"{location}: the package {module} is missing: pip install {module} ({error})") from None
    except ValueError as error:
        raise ShardError(f"{location} is not a URL that fsspec can read: {error}") from None


def list_url(location: str) -> dict[str, int]:
    """Returns the names and sizes in bytes of the files directly at a URL."""
    files, root = open_fsspec(location)
    try:
        files.invalidate_cache()
        listed = [file for file in files.ls(root, detail=True) if file["type"] == "file"]
        sizes = [file["size"] for file in listed]
        if None in sizes:  # a listing over HTTP has no sizes
            sizes = files.sizes([file["name"] for file in listed])
    except Exception as error:  # every file system raises its own classes
        raise _read_error(location, error) from None
    return {file["name"].rpartition("/")[2]: size for file, size in zip(listed, sizes, strict=True)}


def _read_error(url: str, error: BaseException) -> ShardError:
    reason = str(error) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return ShardError(f"{url} not found ({reason}): check the address")
    hint = "check the address and the connection to it"
    if url.startswith("s3://"):
        hint += (
            ", AWS_ENDPOINT_URL if it is not Amazon's, and the credentials: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or FSSPEC_S3_ANON=true for a public bucket"
        )
    return ShardError(f"{url} cannot be read ({reason}): {hint}")


class RemoteStore:
    """Shards at a URL. Only one thread per process may read at a time."""

    def __init__(self, location: str, shards: FileEntries, *, cache_bytes: int, cache_dir: Path) -> None:
        self.location, self.shards = location.rstrip("/"), shards
        self.cache_bytes, self.cache_dir = cache_bytes, Path(cache_dir)
        self._reader: _ProcessReader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_reader": None}

    def location_of(self, shard: str) -> str:
        return f"{self.location}/{shard}"

    def check(self) -> None:
        compare_sizes(self.shards, list_url(self.location), self.location)

    def read(self, shard: str, offset: int, size: int) -> bytes:
        return self.read_many([ByteRange(shard, offset, size)])[0]

    def read_many(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        if self._reader is None or self._reader.pid != os.getpid():
            self._reader = _ProcessReader(self)
        return self._reader.read_many([ByteRange(*part) for part in ranges])

    def stream(self, shard: str) -> Iterator[bytes]:
        return _RangeReader(self.location, self.shards).stream(shard)


class _ProcessReader:
    """The connections and the cache filler of one process. A fork inherits neither, so every process opens its own."""

    def __init__(self, store: RemoteStore) -> None:
        self.pid = os.getpid()
        self.cache = self.filler = None
        self.remote = _RangeReader(store.location, store.shards)
        if store.cache_bytes:
            self.cache = ShardCache(store.location, store.shards, store.cache_dir)
            self.filler = CacheFiller(self.cache, self.remote.stream, store.cache_bytes)
            self.filler.start()

    def __del__(self) -> None:
        if self.filler and self.pid == os.getpid():
            self.filler.stopped.set()

    def read_many(self, parts: list[ByteRange]) -> list[bytes]:
        if self.cache is None or self.filler is None:
            return self.remote.fetch(parts)
        if self.filler.error:
            raise self.filler.error
        cached = [self.cache.read(part) for part in parts]
        missing = [part for part, content in zip(parts, cached, strict=True) if content is None]
        fetched = iter(self.remote.fetch(missing) if missing else ())
        return [next(fetched) if content is None else content for content in cached]


class _RangeReader:
    """Reads ranges of shards from the URL. Failed reads are retried for a few seconds."""

    def __init__(self, location: str, shards: FileEntries) -> None:
        self.location, self.shards = location, shards
        self.files, self.root = open_fsspec(location)

    def fetch(self, parts: Sequence[ByteRange]) -> list[bytes]:
        contents: dict[int, bytes] = {}
        for wait_s in (*_RETRY_AFTER_S, None):
            pending = [number for number in range(len(parts)) if number not in contents]
            results = self.files.cat_ranges(
                [f"{self.root}/{parts[number].shard}" for number in pending],
                [parts[number].offset for number in pending],
                [parts[number].offset + parts[number].size for number in pending],
                on_error="return",
            )
            failed = None
            for number, result in zip(pending, results, strict=True):
                if isinstance(result, BaseException):
                    failed = parts[number].shard, result
                elif len(result) != parts[number].size:
                    self._compare_size(parts[number].shard)
                    raise truncated_error(f"{self.location}/{parts[number].shard}", parts[number], len(result))
                else:
                    contents[number] = result
            if failed is None:
                return [contents[number] for number in range(len(parts))]
            shard, error = failed
            if isinstance(error, FileNotFoundError):
                raise ShardError(f"{self.location}/{shard} is in the manifest but missing: {VERIFY_HINT}") from None
            if wait_s == _RETRY_AFTER_S[0]:  # every file system raises another error for a range past the end
                self._compare_size(shard)
            if wait_s is None or isinstance(error, PermissionError):
                raise _read_error(f"{self.location}/{shard}", error) from None
            _log.debug("%s/%s: %s; retrying", self.location, shard, error)
            time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")

    def stream(self, shard: str) -> Iterator[bytes]:
        size = self.shards[shard]["size"]
        parts = (ByteRange(shard, start, min(CHUNK_BYTES, size - start)) for start in range(0, size, CHUNK_BYTES))
        while batch := list(itertools.islice(parts, _MAX_PARALLEL_CHUNKS)):
            yield from self.fetch(batch)

    def _compare_size(self, shard: str) -> None:
        """Raises ShardError if the size of the shard is known and differs from the manifest."""
        try:
            size = self.files.info(f"{self.root}/{shard}")["size"]
        except Exception:  # every file system raises its own classes; the failed read reports the cause
            return
        compare_sizes({shard: self.shards[shard]}, {shard: size}, self.location)
