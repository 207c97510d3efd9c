"""Whole copies, on each node, of shards that lie elsewhere: as many as a bound allows, made in the background.

The copies lie in one folder a node. The first process there that reads becomes the filler (a lock sees to it): a
thread of it copies shards in the manifest's order up to the bound, each under a partial name until its hash is
right. Nothing is evicted for another shard: an epoch goes through all of them before one comes again, and there
the least recently used copy is always the one needed next.
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

from pipeline.checksum import checksum
from pipeline.store import DAMAGED, Entries, Part, ShardError, allow_open_files

_log = logging.getLogger(__name__)
_KEPT_FREE = 1 << 30  # bytes of the disk that copies leave to others


class Copies:
    """A location's whole shards on this node, each under its name and hash; complete as soon as the name is there."""

    def __init__(self, location: str, shards: Entries, cache: Path) -> None:
        self.location, self.shards = location, shards
        self.cache, self.folder = cache, cache / hashlib.sha256(location.encode()).hexdigest()[:16]
        self.cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.cache.stat().st_uid != os.getuid():
            raise ShardError(f"{self.cache} belongs to another user: set TMPDIR to a folder of your own")
        self._in_use = _lock(_in_use(self.folder), fcntl.LOCK_SH)
        self._descriptors: dict[str, int] = {}

    def __del__(self) -> None:
        for descriptor in (*self.__dict__.pop("_descriptors", {}).values(), self.__dict__.pop("_in_use", None)):
            if descriptor is not None:
                os.close(descriptor)

    def path(self, shard: str) -> Path:
        return self.folder / f"{self.shards[shard]['xxh3']}-{shard}"

    def read(self, part: Part) -> bytes | None:
        """The bytes, or None if there is no copy of that shard."""
        descriptor = self._descriptors.get(part.shard)
        if descriptor is None:
            try:
                descriptor = os.open(self.path(part.shard), os.O_RDONLY)
            except FileNotFoundError:
                return None
            if not self._descriptors:
                allow_open_files(len(self.shards))
            self._descriptors[part.shard] = descriptor
        content = os.pread(descriptor, part.size, part.offset)
        return content if len(content) == part.size else None


class Filler(threading.Thread):
    """Copies shards in the background, if no other process on the node does."""

    def __init__(self, copies: Copies, stream: Callable[[str], Iterator[bytes]], num_bytes: int) -> None:
        super().__init__(name="flopeq-copies", daemon=True)
        self.copies, self.stream, self.num_bytes = copies, stream, num_bytes
        self.left = threading.Event()
        """Nobody reads any more."""
        self.failure: ShardError | None = None
        """A shard is not what the manifest says."""

    def run(self) -> None:
        lock = _lock(self.copies.cache / "filler.lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is None:
            return
        try:
            self._fill()
        except (OSError, ShardError) as error:
            _log.warning("no more copies are made in %s: %s", self.copies.folder, error)
        finally:
            os.close(lock)

    def _fill(self) -> None:
        folder, shards = self.copies.folder, self.copies.shards
        folder.mkdir(exist_ok=True)
        wanted = self._choose(self.num_bytes - self._others())
        keep = {self.copies.path(name).name for name in wanted}
        for path in folder.iterdir():
            if path.name not in keep:
                path.unlink()
        missing = [name for name in wanted if not self.copies.path(name).exists()]
        if missing:
            _log.info("%s: copies of %d of %d shards (%d MB) are kept in %s", self.copies.location, len(wanted),
                      len(shards), sum(shards[name]["size"] for name in wanted) // 10**6, folder)
        for name in missing:
            if shutil.disk_usage(folder).free - shards[name]["size"] < _KEPT_FREE:
                raise OSError(f"the disk has less than {_KEPT_FREE >> 30} GiB left")
            if self.left.is_set() or not self._copy(name):
                return

    def _choose(self, room: int) -> list[str]:
        """Shards in the manifest's order, as many as there is room for."""
        chosen = []
        for name, entry in self.copies.shards.items():
            if entry["size"] <= room:
                chosen.append(name)
                room -= entry["size"]
        return chosen

    def _others(self) -> int:
        """Bytes of other locations' copies, after those that no process uses made room for this one's."""
        needed = sum(self.copies.shards[name]["size"] for name in self._choose(self.num_bytes))
        others = {
            folder: sum(path.stat().st_size for path in folder.iterdir())
            for folder in self.copies.cache.iterdir() if folder.is_dir() and folder != self.copies.folder
        }
        for folder in list(others):
            if sum(others.values()) + needed <= self.num_bytes:
                break
            unused = _lock(_in_use(folder), fcntl.LOCK_EX | fcntl.LOCK_NB)
            if unused is not None:
                shutil.rmtree(folder)
                os.close(unused)
                del others[folder]
        return sum(others.values())

    def _copy(self, name: str) -> bool:
        """Copies one shard; False if it was left or is not what the manifest says."""
        path = self.copies.path(name)
        partial = path.with_name(f"{path.name}.partial")
        digest = checksum()
        with partial.open("wb") as file:
            for content in self.stream(name):
                if self.left.is_set():
                    return False
                digest.update(content)
                file.write(content)
        expected = self.copies.shards[name]["xxh3"]
        if digest.hexdigest() != expected:
            partial.unlink()
            self.failure = ShardError(
                f"{self.copies.location}/{name} does not match its manifest (xxh3 {digest.hexdigest()}, "
                f"not {expected}): {DAMAGED}"
            )
            return False
        os.replace(partial, path)
        return True


def _in_use(folder: Path) -> Path:
    """The lock that every process holds which reads the copies in a folder."""
    return folder.with_name(f"{folder.name}.lock")


def _lock(path: Path, kind: int) -> int | None:
    """A descriptor that holds the lock until it is closed; None if another holds it."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
