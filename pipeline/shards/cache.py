"""A node-local cache of shards at a URL, filled in the background up to a size limit.

Each node has one cache folder. The first process on the node that reads takes a lock and becomes the filler: one of its
threads copies shards in the order of the manifest until the limit is reached. A copy gets its final name after its
checksum is verified. No shard is evicted in favour of another shard of the same data set: an epoch reads every shard
once, so the least recently used copy would always be the one that is needed next.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.base.errors import ShardError
from pipeline.base.files import new_checksum
from pipeline.shards.open_files import OpenFiles
from pipeline.shards.store import VERIFY_HINT, ByteRange, FileEntries

_log = logging.getLogger(__name__)

_MIN_FREE_BYTES = 1 << 30  # disk space that the cache leaves free


class ShardCache:
    """The cached shards of one location on this node. A file with its final name is complete."""

    def __init__(self, location: str, shards: FileEntries, cache_dir: Path) -> None:
        self.location, self.shards = location, shards
        self.cache_dir, self.folder = cache_dir, cache_dir / hashlib.sha256(location.encode()).hexdigest()[:16]
        self.cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.cache_dir.stat().st_uid != os.getuid():
            raise ShardError(f"{self.cache_dir} belongs to another user: set TMPDIR to a folder of your own")
        self._lock_fd = _acquire_lock(_lock_path(self.folder), fcntl.LOCK_SH)
        self._files: OpenFiles | None = None

    def __del__(self) -> None:
        descriptor = self.__dict__.pop("_lock_fd", None)
        if descriptor is not None:
            os.close(descriptor)

    def path(self, shard: str) -> Path:
        """Returns the path of a shard in the cache."""
        return self.folder / f"{self.shards[shard]['xxh3']}-{shard}"

    def read(self, part: ByteRange) -> bytes | None:
        """Returns the bytes, or None if the shard is not in the cache."""
        if self._files is None:
            self._files = OpenFiles(len(self.shards))
        try:
            content = self._files.read(self.path(part.shard), part.offset, part.size)
        except FileNotFoundError:
            return None
        return content if len(content) == part.size else None


class CacheFiller(threading.Thread):
    """Fills the cache in the background, unless another process on the node already does."""

    def __init__(self, cache: ShardCache, stream: Callable[[str], Iterator[bytes]], num_bytes: int) -> None:
        super().__init__(name="flopeq-cache-filler", daemon=True)
        self.cache, self.stream, self.num_bytes = cache, stream, num_bytes
        self.stopped = threading.Event()
        """Set when the reader is closed."""
        self.error: ShardError | None = None
        """Set when a shard does not match the manifest."""

    def run(self) -> None:
        lock = _acquire_lock(self.cache.cache_dir / "filler.lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is None:
            return
        try:
            self._fill_cache()
        except (OSError, ShardError) as error:
            _log.warning("no more shards are cached in %s: %s", self.cache.folder, error)
        finally:
            os.close(lock)

    def _fill_cache(self) -> None:
        folder, shards = self.cache.folder, self.cache.shards
        folder.mkdir(exist_ok=True)
        selected = self._select_shards(self.num_bytes - self._evict_unused())
        keep_names = {self.cache.path(name).name for name in selected}
        for path in folder.iterdir():
            if path.name not in keep_names:
                path.unlink()
        missing = [name for name in selected if not self.cache.path(name).exists()]
        if missing:
            _log.info(
                "%s: %d of %d shards (%d MB) are cached in %s",
                self.cache.location,
                len(selected),
                len(shards),
                sum(shards[name]["size"] for name in selected) // 10**6,
                folder,
            )
        for name in missing:
            if shutil.disk_usage(folder).free - shards[name]["size"] < _MIN_FREE_BYTES:
                raise OSError(f"the disk has less than {_MIN_FREE_BYTES >> 30} GiB left")
            if self.stopped.is_set() or not self._copy_shard(name):
                return

    def _select_shards(self, budget: int) -> list[str]:
        """Returns the shards, in the order of the manifest, that fit into `budget` bytes."""
        selected = []
        for name, entry in self.cache.shards.items():
            if entry["size"] <= budget:
                selected.append(name)
                budget -= entry["size"]
        return selected

    def _evict_unused(self) -> int:
        """Deletes caches of other locations that no process uses, if their space is needed.

        Returns: the bytes that the remaining caches of other locations take.
        """
        needed = sum(self.cache.shards[name]["size"] for name in self._select_shards(self.num_bytes))
        others = {
            folder: sum(path.stat().st_size for path in folder.iterdir())
            for folder in self.cache.cache_dir.iterdir()
            if folder.is_dir() and folder != self.cache.folder
        }
        for folder in list(others):
            if sum(others.values()) + needed <= self.num_bytes:
                break
            unused = _acquire_lock(_lock_path(folder), fcntl.LOCK_EX | fcntl.LOCK_NB)
            if unused is not None:
                shutil.rmtree(folder)
                os.close(unused)
                del others[folder]
        return sum(others.values())

    def _copy_shard(self, name: str) -> bool:
        """Copies one shard. Returns False if the filler was stopped or the shard does not match the manifest."""
        path = self.cache.path(name)
        partial = path.with_name(f"{path.name}.partial")
        digest = new_checksum()
        with partial.open("wb") as file:
            for content in self.stream(name):
                if self.stopped.is_set():
                    return False
                digest.update(content)
                file.write(content)
        expected = self.cache.shards[name]["xxh3"]
        if digest.hexdigest() != expected:
            partial.unlink()
            self.error = ShardError(
                f"{self.cache.location}/{name} does not match its manifest (xxh3 {digest.hexdigest()}, "
                f"not {expected}): {VERIFY_HINT}"
            )
            return False
        os.replace(partial, path)
        return True


def _lock_path(folder: Path) -> Path:
    """Returns the lock file that every process holds while it reads the cached shards in a folder."""
    return folder.with_name(f"{folder.name}.lock")


def _acquire_lock(path: Path, flags: int) -> int | None:
    """Returns a file descriptor that holds the lock until it is closed, or None if another process holds the lock."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, flags)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
