"""Stores at a URL: retries, S3 in loader processes, and clear errors."""

from __future__ import annotations

import sys
import time

import pytest
from torch.utils.data import DataLoader, Dataset

from pipeline.base.errors import ShardError
from pipeline.shards import remote
from pipeline.shards.locations import list_files, open_store
from pipeline.shards.store import Store
from tests.shards.conftest import NAMES, SHARDS, assert_reads, content, put, with_cache


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
