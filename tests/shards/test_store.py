"""Stores: a folder and a URL return the same bytes, the cache stays within its limit, and errors are clear."""

from __future__ import annotations

import pickle

import fsspec
import pytest

from pipeline.base.errors import ShardError
from pipeline.shards.locations import list_files, open_store
from tests.shards.conftest import NAMES, SHARDS, SIZE, assert_reads, content, put


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
    with pytest.raises(ShardError, match=f"{NAMES[2]} (is in the manifest but missing|cannot be read)"):
        shards.read(NAMES[2], 0, 100)
    assert shards.read(NAMES[1], 60_000, 100) == content(NAMES[1])[60_000:60_100]
