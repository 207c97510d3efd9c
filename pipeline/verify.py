"""Comparing the files of a folder of shards with the hashes in its manifest."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checksum import checksum
from pipeline.progress import progress
from pipeline.store import ShardError, Store, find, is_url, open_store, read_manifest, tars_at

MEMO = ".verified.json"
"""Beside the manifest: name -> the hash that a file was found to have, and what tells whether it changed since."""
_NAMED = 20  # damaged files that an error lists


def verify(folder: Path | str) -> None:
    """Hashes every file of the manifest, those at a URL too.

    Raises: ShardError, listing all that are missing or altered, and what to do.
    """
    _verify(Path(folder), all_of_them=True)


def verify_changed(folder: Path | str) -> None:
    """Hashes what was touched since it was last found right; of shards at a URL only the sizes are compared.

    Those are hashed as a node copies them, and the name of every image is compared as it is read.
    Raises: ShardError, listing all that are missing or altered, and what to do.
    """
    _verify(Path(folder), all_of_them=False)


def remember(folder: Path | str) -> None:
    """Takes all files for right: for those who have just written them, and the manifest with their hashes."""
    _write_memo(Path(folder), {file.name: file.mark() for file in _files(Path(folder)) if not file.remote})


@dataclass(frozen=True)
class _File:
    name: str
    store: Store
    remote: bool
    size: int
    xxh3: str
    sizes: dict[str, int]
    """What its place was found to hold."""

    @property
    def where(self) -> str:
        return self.store.where(self.name)

    def fault(self) -> str | None:
        """What is wrong as far as a listing shows."""
        if self.name not in self.sizes:
            return "missing"
        found = self.sizes[self.name]
        return None if found == self.size else f"{found} bytes, not {self.size}"

    def mark(self) -> dict[str, Any] | None:
        """What the memo says of the file; the change time shows a modification time that was set back."""
        if self.remote:
            return None
        stat = os.stat(self.where)
        return {"xxh3": self.xxh3, "stat": [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]}

    def difference(self) -> str | None:
        """What is wrong as all of it is read."""
        digest = checksum()
        try:
            for content in self.store.stream(self.name):
                digest.update(content)
        except ShardError as error:
            return str(error)
        return None if digest.hexdigest() == self.xxh3 else "its contents differ"


def _files(folder: Path) -> Iterator[_File]:
    manifest = read_manifest(folder)
    for location, entries in ((folder, manifest["indices"]), (tars_at(folder, manifest), manifest["shards"])):
        store, sizes = open_store(location, entries), find(location)
        for name, entry in entries.items():
            yield _File(name, store, is_url(location), entry["size"], entry["xxh3"], sizes)


def _verify(folder: Path, *, all_of_them: bool) -> None:
    memo = {} if all_of_them else _read_memo(folder)
    marks: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    suspects = []
    files = list(_files(folder))
    for file in files:
        if fault := file.fault():
            wrong[file.where] = fault
        elif all_of_them or not file.remote:
            marks[file.name] = file.mark()  # before it is read, so that a change from now on shows
            if all_of_them or memo.get(file.name) != marks[file.name]:
                suspects.append(file)
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        progress(f"verifying {folder}", sum(file.size for file in suspects)) as advance,
    ):
        hashed = {pool.submit(file.difference): file for file in suspects}
        for done in as_completed(hashed):
            file = hashed[done]
            if fault := done.result():
                wrong[file.where] = fault
                del marks[file.name]
            advance(num_bytes=file.size)
    _write_memo(folder, {name: mark for name, mark in marks.items() if mark})
    if wrong:
        raise ShardError(_listing(folder, wrong, len(files)))


def _listing(folder: Path, wrong: dict[str, str], num_files: int) -> str:
    lines = [f"{where}: {fault}" for where, fault in sorted(wrong.items())]
    if len(lines) > _NAMED:
        lines[_NAMED:] = [f"... and {len(lines) - _NAMED} more"]
    location = read_manifest(folder).get("location")
    remedy = (
        f"put back what was at {location}; if it was meant to change, `dvc repro --force shard` indexes it again"
        if location else "`dvc repro --force shard` writes these again and keeps the others"
    )
    return "\n  ".join([f"{len(wrong)} of the {num_files} files of {folder} are damaged:", *lines, remedy])


def _read_memo(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / MEMO).read_text())
    return {}


def _write_memo(folder: Path, marks: dict[str, Any]) -> None:
    """Leaves no memo where it cannot be written: shards may lie on a read-only disk."""
    partial = folder / f"{MEMO}.{os.getpid()}.partial"
    with contextlib.suppress(OSError):
        partial.write_text(json.dumps(marks, indent=1))
        os.replace(partial, folder / MEMO)
