"""Opening and listing a location, which is a folder or an fsspec URL."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pipeline.shards import remote
from pipeline.shards.store import FileEntries, LocalStore, Store, is_url, list_folder


def open_store(
    location: Path | str, shards: FileEntries, *, cache_gib: float = 0, cache_dir: Path | None = None
) -> Store:
    """Returns a store for the shards in a folder or at an fsspec URL. Files are opened on the first read.

    Args:
        cache_gib: size limit of the node-local cache for shards at a URL, in GiB. 0 turns the cache off.
        cache_dir: folder of the cache. None uses a folder of this user in the system's temporary folder (TMPDIR).
    """
    if not is_url(location):
        return LocalStore(Path(location), shards)
    cache_dir = cache_dir or Path(tempfile.gettempdir()) / f"flopeq-{os.getuid()}"
    return remote.RemoteStore(str(location), shards, cache_bytes=int(cache_gib * 2**30), cache_dir=cache_dir)


def list_files(location: Path | str) -> dict[str, int]:
    """Returns the names and sizes in bytes of the files directly in a folder or at an fsspec URL.

    Raises: ShardError if the location does not exist or cannot be listed.
    """
    return remote.list_url(str(location)) if is_url(location) else list_folder(Path(location))
