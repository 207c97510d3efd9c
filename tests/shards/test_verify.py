"""Verification: damaged files are listed, and only changed files are hashed again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipeline.base.errors import ShardError
from pipeline.shards import manifests, store, verify
from tests.shards.conftest import NAMES, SHARDS, SIZE, content, entry, put


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of shards for verification: tars, indices and a manifest."""
    put(f"{tmp_path}/out")
    indices = {f"{split}.index.parquet": split.encode() * 50 for split in ("train", "val")}
    put(f"{tmp_path}/out", **indices)
    manifest = {
        "location": None,
        "shards": SHARDS,
        "indices": {name: entry(data) for name, data in indices.items()},
        "classes": [],
        "counts": {},
    }
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path / "out"


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files that are read as a whole, in order."""
    names: list[str] = []
    stream = store.LocalStore.stream

    def recording_stream(self, shard):
        names.append(shard)
        return stream(self, shard)

    monkeypatch.setattr(store.LocalStore, "stream", recording_stream)
    return names


def test_verify_lists_all_damaged_files(folder):
    verify.verify_all(folder)
    (folder / NAMES[0]).unlink()
    (folder / NAMES[1]).write_bytes(content(NAMES[1])[:-1])
    (folder / NAMES[2]).write_bytes(content(NAMES[1]))
    (folder / "val.index.parquet").write_bytes(b"?" * 150)
    for check in (verify.verify_all, verify.verify_changed):
        with pytest.raises(ShardError) as error:
            check(folder)
        lines = str(error.value).splitlines()
        assert lines[0] == f"4 of the 6 files of {folder} are damaged:"
        assert [line.strip().removeprefix(f"{folder}/") for line in lines[1:-1]] == [
            f"{NAMES[0]}: missing",
            f"{NAMES[1]}: 99999 bytes, not 100000",
            f"{NAMES[2]}: its contents differ",
            "val.index.parquet: its contents differ",
        ]
        assert "`dvc repro --force shard` writes these again" in lines[-1]


def test_only_changed_files_are_hashed_again(folder, hashed):
    def names_hashed() -> set[str]:
        hashed.clear()
        verify.verify_changed(folder)
        return set(hashed)

    everything = {*NAMES, "train.index.parquet", "val.index.parquet"}
    assert names_hashed() == everything
    assert names_hashed() == set()
    os.utime(folder / NAMES[1])
    assert names_hashed() == {NAMES[1]}
    hashed.clear()
    verify.verify_all(folder)
    assert set(hashed) == everything
    (folder / verify.VERIFIED_FILE).unlink()
    verify.mark_verified(folder)
    assert names_hashed() == set()
    (folder / verify.VERIFIED_FILE).write_text("{")
    assert names_hashed() == everything


def test_a_change_with_a_restored_mtime_is_found(folder):
    verify.verify_changed(folder)
    path = folder / NAMES[3]
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.write(b"?")
    os.utime(path, ns=times)
    for _ in range(2):
        with pytest.raises(ShardError, match=f"{NAMES[3]}: its contents differ"):
            verify.verify_changed(folder)


def test_shards_at_a_url_are_hashed_by_verify_all_only(folder, tmp_path):
    put(f"memory://{tmp_path.name}")
    manifest = manifests.read_manifest(folder) | {"location": f"memory://{tmp_path.name}"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    put(f"memory://{tmp_path.name}", **{NAMES[0]: bytes(SIZE)})
    verify.verify_changed(folder)
    with pytest.raises(ShardError, match=f"{NAMES[0]}: its contents differ.*\n.*restore the files at memory://"):
        verify.verify_all(folder)
    put(f"memory://{tmp_path.name}", **{NAMES[0]: b"short"})
    with pytest.raises(ShardError, match=f"{NAMES[0]}: 5 bytes, not 100000"):
        verify.verify_changed(folder)


def test_a_missing_manifest_is_reported(folder):
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ShardError, match="manifest.json is not valid JSON: run `dvc repro --force shard`"):
        verify.verify_all(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ShardError, match="manifest.json not found: run `dvc repro shard`"):
        verify.verify_all(folder)
