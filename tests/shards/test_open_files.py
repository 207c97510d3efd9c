"""A process may read from more files than it may keep open."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from pipeline.shards import open_files
from pipeline.shards.open_files import OpenFiles


def write(folder: Path, number: int) -> list[Path]:
    paths = [folder / f"{index}.tar" for index in range(number)]
    for index, path in enumerate(paths):
        path.write_bytes(bytes([index]) * 10)
    return paths


@pytest.mark.parametrize("bound", ["ours", "the system's"])
def test_the_file_not_read_for_longest_is_closed(bound, tmp_path, monkeypatch):
    if bound == "ours":
        monkeypatch.setattr(open_files, "MAX_OPEN_FILES", 3)
    else:
        monkeypatch.setattr(open_files, "_RESERVED", 100)
        monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 103))
        monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    paths, files = write(tmp_path, 6), OpenFiles(6)
    assert files.limit == 3
    for index in (0, 1, 2, 0, 3, 0, 5, 4):
        assert files.read(paths[index], 4, 3) == bytes([index]) * 3
        assert len(files) <= 3
    assert list(files._descriptors) == [paths[index] for index in (0, 5, 4)]


def test_a_missing_file_is_not_kept(tmp_path):
    files = OpenFiles(2)
    with pytest.raises(FileNotFoundError):
        files.read(tmp_path / "missing", 0, 1)
    assert len(files) == 0
