"""Verification of a folder of shards against the checksums in its manifest."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.base.errors import ShardError
from pipeline.base.files import new_checksum
from pipeline.base.progress import progress_bar
from pipeline.shards.locations import list_files, open_store
from pipeline.shards.manifests import read_manifest, shards_location
from pipeline.shards.store import Store, is_url

VERIFIED_FILE = ".verified.json"
"""File beside the manifest that maps each verified file to its checksum and its stat signature at that time."""

_MAX_LISTED = 20  # number of damaged files that an error lists


def verify_all(folder: Path | str) -> None:
    """Hashes every file of the manifest, including shards at a URL.

    Raises: ShardError with all missing and altered files, and what to do.
    """
    _verify(Path(folder), rehash_all=True)


def verify_changed(folder: Path | str) -> None:
    """Hashes the files that changed since they were last verified. For shards at a URL it compares only the sizes.

    Shards at a URL are hashed when a node caches them, and the name of every image is checked when it is read.
    Raises: ShardError with all missing and altered files, and what to do.
    """
    _verify(Path(folder), rehash_all=False)


def mark_verified(folder: Path | str) -> None:
    """Marks all local files as verified. Call this after writing the files and their manifest."""
    files = _list_files(Path(folder))
    _save_verified(Path(folder), {file.name: file.stat_signature() for file in files if not file.remote})


@dataclass(frozen=True)
class _ShardFile:
    name: str
    store: Store
    remote: bool
    size: int
    xxh3: str
    sizes: dict[str, int]
    """Names and sizes of the files at its location."""

    @property
    def location(self) -> str:
        return self.store.location_of(self.name)

    def size_error(self) -> str | None:
        """Returns what is wrong with the file according to a listing, or None."""
        if self.name not in self.sizes:
            return "missing"
        found = self.sizes[self.name]
        return None if found == self.size else f"{found} bytes, not {self.size}"

    def stat_signature(self) -> dict[str, Any] | None:
        """Returns what identifies the current state of a local file. ctime reveals an mtime that was set back."""
        if self.remote:
            return None
        stat = os.stat(self.location)
        return {"xxh3": self.xxh3, "stat": [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]}

    def content_error(self) -> str | None:
        """Reads the whole file and returns what is wrong with it, or None."""
        digest = new_checksum()
        try:
            for content in self.store.stream(self.name):
                digest.update(content)
        except ShardError as error:
            return str(error)
        return None if digest.hexdigest() == self.xxh3 else "its contents differ"


def _list_files(folder: Path) -> Iterator[_ShardFile]:
    manifest = read_manifest(folder)
    for location, entries in ((folder, manifest["indices"]), (shards_location(folder, manifest), manifest["shards"])):
        store, sizes = open_store(location, entries), list_files(location)
        for name, entry in entries.items():
            yield _ShardFile(name, store, is_url(location), entry["size"], entry["xxh3"], sizes)


def _verify(folder: Path, *, rehash_all: bool) -> None:
    verified = {} if rehash_all else _load_verified(folder)
    signatures: dict[str, Any] = {}
    damaged: dict[str, str] = {}
    to_hash = []
    files = list(_list_files(folder))
    for file in files:
        if problem := file.size_error():
            damaged[file.location] = problem
        elif rehash_all or not file.remote:
            signatures[file.name] = file.stat_signature()  # before reading, so that a later change is noticed
            if rehash_all or verified.get(file.name) != signatures[file.name]:
                to_hash.append(file)
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        progress_bar(f"verifying {folder}", sum(file.size for file in to_hash)) as advance,
    ):
        futures = {pool.submit(file.content_error): file for file in to_hash}
        for future in as_completed(futures):
            file = futures[future]
            if problem := future.result():
                damaged[file.location] = problem
                del signatures[file.name]
            advance(num_bytes=file.size)
    _save_verified(folder, {name: signature for name, signature in signatures.items() if signature})
    if damaged:
        raise ShardError(_format_damage(folder, damaged, len(files)))


def _format_damage(folder: Path, damaged: dict[str, str], num_files: int) -> str:
    lines = [f"{path}: {problem}" for path, problem in sorted(damaged.items())]
    if len(lines) > _MAX_LISTED:
        lines[_MAX_LISTED:] = [f"... and {len(lines) - _MAX_LISTED} more"]
    location = read_manifest(folder).get("location")
    hint = (
        f"restore the files at {location}; if the change was intended, `dvc repro --force shard` indexes them again"
        if location
        else "`dvc repro --force shard` writes these again and keeps the others"
    )
    return "\n  ".join([f"{len(damaged)} of the {num_files} files of {folder} are damaged:", *lines, hint])


def _load_verified(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / VERIFIED_FILE).read_text())
    return {}


def _save_verified(folder: Path, signatures: dict[str, Any]) -> None:
    """Writes the file of verified files, if possible: the shards may be on a read-only disk."""
    partial = folder / f"{VERIFIED_FILE}.{os.getpid()}.partial"
    with contextlib.suppress(OSError):
        partial.write_text(json.dumps(signatures, indent=1))
        os.replace(partial, folder / VERIFIED_FILE)
