"""Atomic writes, JSON files, checksums, and folders that may be at a URL."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from xxhash import xxh3_128

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


def read_json(path: Path, default: Any) -> Any:
    """Returns the content of a JSON file, or `default` if the file does not exist."""
    return json.loads(path.read_text()) if path.is_file() else default


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file under a temporary name and renames it. Creates the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


_CHUNK_BYTES = 4 << 20


class Checksum(Protocol):
    """An incremental checksum."""

    def update(self, content: bytes | bytearray | memoryview, /) -> None:
        """Adds bytes to the checksum. Releases the GIL."""
        ...

    def hexdigest(self) -> str:
        """Returns the checksum of all bytes so far, as 32 hexadecimal digits."""
        ...


def new_checksum() -> Checksum:
    """Returns an empty checksum (128-bit XXH3)."""
    return xxh3_128()


def checksum_file(path: Path) -> str:
    """Returns the checksum of the content of a file."""
    digest = new_checksum()
    with path.open("rb", buffering=0) as file:
        while content := file.read(_CHUNK_BYTES):
            digest.update(content)
    return digest.hexdigest()


def open_filesystem(location: str) -> tuple[FileSystem, str]:
    """Returns the file system of a folder or URL, and the path within it."""
    from pyarrow import fs  # only trainings need it

    if "://" in location:
        return fs.FileSystem.from_uri(location)
    return fs.LocalFileSystem(), str(Path(location).absolute())


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Context manager that yields a temporary path beside `path`.

    The file is renamed to `path` when the block ends, or deleted if the block raises.
    """
    partial = partial_path(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """Returns an unused temporary path beside `path`."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
