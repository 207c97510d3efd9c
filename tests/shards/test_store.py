"""Stores: a folder and a URL return the same bytes, the cache stays within its limit, and errors are clear."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from pipeline.base.errors import ShardError
from pipeline.base.files import new_checksum
from pipeline.shards import cache, manifests, remote, store, verify
from pipeline.shards.locations import list_files, open_store
from pipeline.shards.store import ByteRange, Store

SIZE = 100_000

NAMES = [f"train-{number:06d}.tar" for number in range(4)]

GIB = 1 << 30


def content(name: str) -> bytes:
    return np.random.default_rng(list(name.encode())).bytes(SIZE)


def entry(data: bytes) -> dict[str, object]:
    digest = new_checksum()
    digest.update(data)
    return {"size": len(data), "xxh3": digest.hexdigest()}


SHARDS = {name: entry(content(name)) for name in NAMES}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The address of an S3 server on this machine."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty bucket on that server. Environment variables hold its address and credentials."""
    import s3fs

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{tmp_path.name.replace('_', '-').lower()[:40]}"
    fsspec.filesystem("s3").mkdir(bucket)
    yield f"s3://{bucket}"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["folder", "file", "memory", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The shards at a location of each kind."""
    if request.param == "s3":
        location = f"{request.getfixturevalue('s3')}/shards"
    else:
        location = {
            "folder": f"{tmp_path}/shards",
            "file": f"file://{tmp_path}/shards",
            "memory": f"memory://{tmp_path.name}",
        }[request.param]
    put(location)
    return location


@pytest.fixture
def url(tmp_path: Path) -> str:
    """The shards at a URL that needs no server."""
    put(f"file://{tmp_path}/shards")
    return f"file://{tmp_path}/shards"


def put(location: str, **contents: bytes) -> None:
    """Writes the shards, or files with the given contents."""
    files, root = fsspec.core.url_to_fs(location)
    files.makedirs(root, exist_ok=True)
    for name, data in (contents or {name: content(name) for name in NAMES}).items():
        files.pipe_file(f"{root}/{name}", data)


def assert_reads(shards: Store) -> None:
    """Reads ranges of every shard, including its first and its last byte."""
    parts = [ByteRange(name, offset, size) for name in NAMES for offset, size in ((0, 1), (512, 3000), (SIZE - 7, 7))]
    for (name, offset, size), data in zip(parts, shards.read_many(parts), strict=True):
        assert data == content(name)[offset : offset + size]
    assert shards.read(NAMES[1], 0, SIZE) == content(NAMES[1])


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, "the condition is not met after 20 s"
        time.sleep(0.01)


def cached(cache: Path) -> set[str]:
    """Names of the shards that are completely cached."""
    return {path.name.partition("-")[2] for path in cache.glob("*/*.tar")}


def with_cache(url: str, cache: Path, num_shards: float) -> Store:
    """A store whose cache holds that many shards."""
    return open_store(url, SHARDS, cache_gib=num_shards * SIZE / GIB, cache_dir=cache)


def test_a_folder_and_a_url_return_the_same_bytes(location):
    shards = open_store(location, SHARDS)
    shards.check()
    assert list_files(location) == {name: SIZE for name in NAMES}
    assert_reads(shards)
    assert b"".join(shards.stream(NAMES[0])) == content(NAMES[0])
    assert_reads(pickle.loads(pickle.dumps(shards)))


def test_a_truncated_or_missing_shard_is_named_with_its_expected_size(location):
    put(location, **{NAMES[1]: content(NAMES[1])[:50_000]})
    shards = open_store(location, SHARDS)
    with pytest.raises(ShardError, match=rf"{NAMES[1]} does not match its manifest \(50000 bytes, not 100000\)"):
        shards.check()
    for offset in (49_990, 60_000):
        with pytest.raises(
            ShardError, match=f"{NAMES[1]} (is truncated: expected 100 bytes|does not match).*`make verify`"
        ):
            shards.read(NAMES[1], offset, 100)
    files, root = fsspec.core.url_to_fs(location)
    files.rm_file(f"{root}/{NAMES[2]}")
    put(location, **{NAMES[1]: content(NAMES[1])})
    shards = open_store(location, SHARDS)
    with pytest.raises(ShardError, match=f"{NAMES[2]} is in the manifest but missing"):
        shards.check()
    with pytest.raises(ShardError, match=f"{NAMES[2]} (is in the manifest but missing|cannot be opened)"):
        shards.read(NAMES[2], 0, 100)
    assert shards.read(NAMES[1], 60_000, 100) == content(NAMES[1])[60_000:60_100]


def test_ranges_are_read_until_the_cache_is_filled(url, tmp_path, monkeypatch):
    go_on = threading.Event()
    stream = remote._RangeReader.stream

    def blocked_stream(self, shard):
        go_on.wait()
        return stream(self, shard)

    monkeypatch.setattr(remote._RangeReader, "stream", blocked_stream)
    shards = with_cache(url, tmp_path / "cache", 4)
    assert_reads(shards)
    assert not cached(tmp_path / "cache")
    go_on.set()
    wait_until(lambda: cached(tmp_path / "cache") == set(NAMES))
    shutil.rmtree(tmp_path / "shards")
    assert_reads(shards)
    assert_reads(with_cache(url, tmp_path / "cache", 4))
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_the_cache_stays_within_its_limit(url, tmp_path):
    cache = tmp_path / "cache"
    shards = with_cache(url, cache, 2.5)
    shards.read(NAMES[3], 0, 1)
    filler = shards._reader.filler
    filler.join()
    assert cached(cache) == set(NAMES[:2])
    assert_reads(shards)
    assert cached(cache) == set(NAMES[:2])

    smaller = with_cache(url, cache, 1.5)
    smaller.read(NAMES[3], 0, 1)
    smaller._reader.filler.join()
    assert cached(cache) == set(NAMES[:1])


def test_the_limit_holds_for_all_data_sets_of_a_node(url, tmp_path):
    cache = tmp_path / "cache"
    put(f"file://{tmp_path}/others")

    def fill(location: str) -> Store:
        shards = with_cache(location, cache, 5)
        shards.read(NAMES[0], 0, 1)
        shards._reader.filler.join()
        return shards

    def num_cached(shards: Store) -> int:
        return len(list(shards._reader.cache.folder.glob("*.tar")))

    in_use = fill(url)
    others = fill(f"file://{tmp_path}/others")
    assert num_cached(in_use) == 4 and num_cached(others) == 1
    del in_use
    others = fill(f"file://{tmp_path}/others")
    assert num_cached(others) == len(list(cache.glob("*/*.tar"))) == 4


def test_leftovers_of_another_filler_are_removed(url, tmp_path):
    shards = with_cache(url, tmp_path / "cache", 1)
    shards.read(NAMES[3], 0, 1)
    shards._reader.filler.join()
    folder = shards._reader.cache.folder
    for name in ("of-another-hash-train-000000.tar", "0-train-000000.tar.partial"):
        (folder / name).write_bytes(b"...")
    again = with_cache(url, tmp_path / "cache", 1)
    again.read(NAMES[3], 0, 1)
    again._reader.filler.join()
    assert [path.name.partition("-")[2] for path in folder.iterdir()] == NAMES[:1]


def test_one_process_per_node_fills_the_cache(url, tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    go_on, done = context.Event(), context.Event()
    receiver, sender = context.Pipe()
    stream = remote._RangeReader.stream

    def blocked_stream(self, shard):
        go_on.wait()
        return stream(self, shard)

    monkeypatch.setattr(remote._RangeReader, "stream", blocked_stream)
    cache = tmp_path / "cache"

    def other() -> None:
        shards = with_cache(url, cache, 4)
        assert_reads(shards)
        shards._reader.filler.join(10)
        sender.send(shards._reader.filler.is_alive())
        done.wait()
        shutil.rmtree(tmp_path / "shards")
        assert_reads(shards)
        sender.send("read")

    shards = with_cache(url, cache, 4)
    assert_reads(shards)
    wait_until(lambda: (cache / "filler.lock").exists())
    process = context.Process(target=other)
    process.start()
    assert receiver.poll(20) and receiver.recv() is False
    assert shards._reader.filler.is_alive() and not cached(cache)
    go_on.set()
    wait_until(lambda: cached(cache) == set(NAMES))
    done.set()
    assert receiver.poll(20) and receiver.recv() == "read"
    process.join()


def test_an_altered_shard_is_told_as_it_is_cached(url, tmp_path):
    altered = bytearray(content(NAMES[1]))
    altered[600] ^= 1
    put(url, **{NAMES[1]: bytes(altered)})
    shards = with_cache(url, tmp_path / "cache", 4)
    shards.check()
    shards.read(NAMES[0], 0, 1)
    shards._reader.filler.join()
    expected = SHARDS[NAMES[1]]["xxh3"]
    with pytest.raises(ShardError, match=rf"{NAMES[1]} does not match its manifest \(xxh3 .*, not {expected}\)"):
        shards.read(NAMES[0], 0, 1)
    assert cached(tmp_path / "cache") == set(NAMES[:1])


def test_a_full_disk_stops_caching_but_not_reading(url, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache, "_MIN_FREE_BYTES", 1 << 60)
    shards = with_cache(url, tmp_path / "cache", 4)
    assert_reads(shards)
    shards._reader.filler.join()
    assert_reads(shards)
    assert "no more shards are cached" in caplog.text and not cached(tmp_path / "cache")


def test_transient_errors_are_retried(url, monkeypatch):
    shards = open_store(url, SHARDS)
    shards.read(NAMES[0], 0, 1)
    files = shards._reader.remote.files
    answers = files.cat_ranges
    failures = iter([ConnectionError("reset"), TimeoutError("late")])

    def failing(paths, starts, ends, **options):
        contents = answers(paths, starts, ends, **options)
        contents[0] = next(failures, contents[0])
        return contents

    monkeypatch.setattr(files, "cat_ranges", failing)
    monkeypatch.setattr(remote, "_RETRY_AFTER_S", (0, 0))
    assert_reads(shards)
    failures = iter([ConnectionError("reset")] * 9)
    with pytest.raises(ShardError, match=f"shards/{NAMES[0]} cannot be read .reset.: check the address"):
        shards.read(NAMES[0], 0, 1)


class FirstBytes(Dataset):
    """The first bytes of each shard."""

    def __init__(self, shards: Store) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return len(NAMES)

    def __getitem__(self, number: int) -> bytes:
        return self.shards.read(NAMES[number], 0, 100)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("num_shards", [0, 2])
def test_forked_loader_processes_read_from_s3(s3, tmp_path, num_shards):
    put(f"{s3}/shards")
    shards = with_cache(f"{s3}/shards", tmp_path / "cache", num_shards)
    assert_reads(shards)
    loader = DataLoader(FirstBytes(shards), batch_size=None, num_workers=2)
    for _ in range(2):
        assert list(loader) == [content(name)[:100] for name in NAMES]
    assert_reads(shards)


def test_a_missing_bucket_is_reported(s3):
    with pytest.raises(ShardError, match="s3://no-such-bucket/x not found .*: check the address"):
        list_files("s3://no-such-bucket/x")
    with pytest.raises(ShardError, match="s3://.*/nothing not found"):
        list_files(f"{s3}/nothing")


def test_missing_credentials_are_reported_in_seconds(s3, monkeypatch):
    import s3fs

    put(f"{s3}/shards")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3fs.S3FileSystem.clear_instance_cache()
    started = time.monotonic()
    with pytest.raises(ShardError, match="locate credentials.*AWS_ACCESS_KEY_ID.*FSSPEC_S3_ANON=true"):
        list_files(f"{s3}/shards")
    assert time.monotonic() - started < 10


@pytest.mark.slow
def test_an_unreachable_endpoint_is_reported_in_seconds(s3, monkeypatch):
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    started = time.monotonic()
    with pytest.raises(ShardError, match="127.0.0.1:9.*check the address.*AWS_ENDPOINT_URL"):
        list_files(s3)
    assert time.monotonic() - started < 20


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(ShardError, match="s3://bucket/x: the package s3fs is missing: pip install s3fs"):
        list_files("s3://bucket/x")
    with pytest.raises(ShardError, match="pip install s3fs"):
        open_store("s3://bucket/x", SHARDS).read(NAMES[0], 0, 1)
    with pytest.raises(ShardError, match="nosuch://x is not a URL that fsspec can read: Protocol not known: nosuch"):
        list_files("nosuch://x")


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
