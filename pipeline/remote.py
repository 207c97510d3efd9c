"""Shards at an fsspec URL: from the node's copy where there is one, else by range reads."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.copies import Copies, Filler
from pipeline.store import CHUNK, DAMAGED, Entries, Part, ShardError, compare, short

_log = logging.getLogger(__name__)
_RETRY_AFTER_S = (0.2, 1.0, 4.0)
_STREAMS = 4  # pieces of one shard under way together: a single S3 stream gives some 80 MB/s


def connect(location: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. Raises: ShardError, with the package that is missing."""
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    for chatty in ("aiobotocore", "botocore"):  # they tell each process, at INFO, where credentials were found
        logging.getLogger(chatty).setLevel(logging.WARNING)
    protocol = location.partition("://")[0]
    try:
        return url_to_fs(location)
    except ImportError as error:
        module = known_implementations.get(protocol, {}).get("class", protocol).partition(".")[0]
        raise ShardError(f"{location}: the package {module} is missing: pip install {module} ({error})") from None
    except ValueError as error:
        raise ShardError(f"{location} is no URL that fsspec reads: {error}") from None


def find(location: str) -> dict[str, int]:
    """Names and sizes of the files directly at a URL."""
    files, root = connect(location)
    try:
        files.invalidate_cache()
        listed = [file for file in files.ls(root, detail=True) if file["type"] == "file"]
        sizes = [file["size"] for file in listed]
        if None in sizes:  # a listing over http has none
            sizes = files.sizes([file["name"] for file in listed])
    except Exception as error:  # of the file system's own classes, which differ
        raise _unreadable(location, error) from None
    return {file["name"].rpartition("/")[2]: size for file, size in zip(listed, sizes, strict=True)}


def _unreadable(url: str, error: BaseException) -> ShardError:
    said = str(error) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return ShardError(f"{url} not found ({said}): check the address")
    advice = "check the address and that this machine reaches it"
    if url.startswith("s3://"):
        advice += (
            ", AWS_ENDPOINT_URL where it is not Amazon's, and the credentials: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or FSSPEC_S3_ANON=true for a public bucket"
        )
    return ShardError(f"{url} cannot be read ({said}): {advice}")


class RemoteStore:
    """Shards at a URL. One thread of a process reads at a time."""

    def __init__(self, location: str, shards: Entries, *, cache_bytes: int, cache: Path) -> None:
        self.location, self.shards = location.rstrip("/"), shards
        self.cache_bytes, self.cache = cache_bytes, Path(cache)
        self._opened: _Opened | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_opened": None}

    def where(self, shard: str) -> str:
        return f"{self.location}/{shard}"

    def check(self) -> None:
        compare(self.shards, find(self.location), self.location)

    def read(self, shard: str, offset: int, size: int) -> bytes:
        return self.read_all([Part(shard, offset, size)])[0]

    def read_all(self, parts: Sequence[Part]) -> list[bytes]:
        if self._opened is None or self._opened.pid != os.getpid():
            self._opened = _Opened(self)
        return self._opened.read_all([Part(*part) for part in parts])

    def stream(self, shard: str) -> Iterator[bytes]:
        return _Remote(self.location, self.shards).stream(shard)


class _Opened:
    """What one process has open of a store: a fork takes over neither connections nor the filler."""

    def __init__(self, store: RemoteStore) -> None:
        self.pid = os.getpid()
        self.copies = self.filler = None
        self.remote = _Remote(store.location, store.shards)
        if store.cache_bytes:
            self.copies = Copies(store.location, store.shards, store.cache)
            self.filler = Filler(self.copies, self.remote.stream, store.cache_bytes)
            self.filler.start()

    def __del__(self) -> None:
        if self.filler and self.pid == os.getpid():
            self.filler.left.set()

    def read_all(self, parts: list[Part]) -> list[bytes]:
        if self.copies is None or self.filler is None:
            return self.remote.fetch(parts)
        if self.filler.failure:
            raise self.filler.failure
        found = [self.copies.read(part) for part in parts]
        missing = [part for part, content in zip(parts, found, strict=True) if content is None]
        fetched = iter(self.remote.fetch(missing) if missing else ())
        return [next(fetched) if content is None else content for content in found]


class _Remote:
    """Ranges of the shards, read from the URL itself; what fails is tried again for some seconds."""

    def __init__(self, location: str, shards: Entries) -> None:
        self.location, self.shards = location, shards
        self.files, self.root = connect(location)

    def fetch(self, parts: Sequence[Part]) -> list[bytes]:
        contents: dict[int, bytes] = {}
        for wait_s in (*_RETRY_AFTER_S, None):
            left = [place for place in range(len(parts)) if place not in contents]
            answers = self.files.cat_ranges(
                [f"{self.root}/{parts[place].shard}" for place in left],
                [parts[place].offset for place in left],
                [parts[place].offset + parts[place].size for place in left],
                on_error="return",
            )
            failed = None
            for place, answer in zip(left, answers, strict=True):
                if isinstance(answer, BaseException):
                    failed = parts[place].shard, answer
                elif len(answer) != parts[place].size:
                    self._compare_size(parts[place].shard)
                    raise short(f"{self.location}/{parts[place].shard}", parts[place], len(answer))
                else:
                    contents[place] = answer
            if failed is None:
                return [contents[place] for place in range(len(parts))]
            shard, error = failed
            if isinstance(error, FileNotFoundError):
                raise ShardError(f"{self.location}/{shard} is in the manifest but missing: {DAMAGED}") from None
            if wait_s == _RETRY_AFTER_S[0]:  # a range behind the end is an error, and of every file system another
                self._compare_size(shard)
            if wait_s is None or isinstance(error, PermissionError):
                raise _unreadable(f"{self.location}/{shard}", error) from None
            _log.debug("%s/%s: %s; trying again", self.location, shard, error)
            time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")

    def stream(self, shard: str) -> Iterator[bytes]:
        size = self.shards[shard]["size"]
        parts = (Part(shard, start, min(CHUNK, size - start)) for start in range(0, size, CHUNK))
        while several := list(itertools.islice(parts, _STREAMS)):
            yield from self.fetch(several)

    def _compare_size(self, shard: str) -> None:
        """Raises ShardError if the shard's size is known and another than the manifest's."""
        try:
            size = self.files.info(f"{self.root}/{shard}")["size"]
        except Exception:  # of the file system's own classes; what is wrong is told by the read that failed
            return
        compare({shard: self.shards[shard]}, {shard: size}, self.location)
