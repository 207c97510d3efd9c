"""The cache: its limit, its filling by one process, and what it does with damage and full disks."""

from __future__ import annotations

import multiprocessing
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.base.errors import ShardError
from pipeline.shards import cache, remote
from pipeline.shards.store import Store
from tests.shards.conftest import NAMES, SHARDS, assert_reads, content, put, with_cache


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, "the condition is not met after 20 s"
        time.sleep(0.01)


def cached(cache: Path) -> set[str]:
    """Names of the shards that are completely cached."""
    return {path.name.partition("-")[2] for path in cache.glob("*/*.tar")}


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
    with suppress(ShardError):  # if it is cached already
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
