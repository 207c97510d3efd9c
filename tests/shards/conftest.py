"""Four shards in a folder, at a URL, and in a bucket of a local S3 server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pipeline.base.files import new_checksum
from pipeline.shards.locations import open_store
from pipeline.shards.store import ByteRange, Store

SIZE = 100_000


GIB = 1 << 30

NAMES = [f"train-{number:06d}.tar" for number in range(4)]


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


def with_cache(url: str, cache: Path, num_shards: float) -> Store:
    """A store whose cache holds that many shards."""
    return open_store(url, SHARDS, cache_gib=num_shards * SIZE / GIB, cache_dir=cache)
