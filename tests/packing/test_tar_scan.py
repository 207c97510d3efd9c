"""Tars are scanned to their end: cuts and altered headers are found."""

from __future__ import annotations

import tarfile

import pytest

from pipeline.base.errors import ShardError
from pipeline.loading.datasets import IndexedImages
from pipeline.packing.indexing import index_shards
from pipeline.packing.tar_scan import scan_tar
from pipeline.shards.locations import open_store
from tests.packing import layouts
from tests.packing.conftest import FIRST_SHARD, JPEG


def test_a_shard_cut_anywhere_is_refused(tars):
    content = (tars / FIRST_SHARD).read_bytes()
    end = -(-len(content.rstrip(b"\0")) // 512) * 512  # then come the zeros that end the tar
    store = open_store(tars, {FIRST_SHARD: {"size": len(content)}})
    whole = scan_tar(store, FIRST_SHARD)
    for cut in sorted({*range(0, end + 1024, 512), *range(100, end, 700), end + 1023}):
        (tars / FIRST_SHARD).write_bytes(content[:cut])
        with pytest.raises(ShardError, match=f"{FIRST_SHARD} is truncated or altered near byte {cut}"):
            scan_tar(open_store(tars, {FIRST_SHARD: {"size": cut}}), FIRST_SHARD)
    (tars / FIRST_SHARD).write_bytes(content[: end + 1024])
    assert scan_tar(open_store(tars, {}), FIRST_SHARD).samples == whole.samples


def test_an_altered_header_is_refused(tars):
    content = bytearray((tars / FIRST_SHARD).read_bytes())
    offset = scan_tar(open_store(tars, {}), FIRST_SHARD).samples["offset"][2].as_py() - 512
    content[offset] ^= 1
    (tars / FIRST_SHARD).write_bytes(content)
    with pytest.raises(ShardError, match=f"{FIRST_SHARD} is truncated or altered near byte"):
        scan_tar(open_store(tars, {}), FIRST_SHARD)
    (tars / FIRST_SHARD).write_bytes(bytes(content[:offset]) + bytes(1024) + bytes(content[offset:]))
    with pytest.raises(ShardError, match=f"{FIRST_SHARD} is truncated or altered"):
        scan_tar(open_store(tars, {}), FIRST_SHARD)


def test_folders_long_names_and_other_files_are_handled(tmp_path):
    name = f"{'d' * 60}/{'e' * 60}/image"
    for number, kind in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)):
        for split in ("train", "val"):
            path = tmp_path / "tars" / f"{split}-{number}.tar"
            path.parent.mkdir(exist_ok=True)
            with tarfile.open(path, "w", format=kind) as tar:
                folder = tarfile.TarInfo("./d.jpg")
                folder.type = tarfile.DIRTYPE
                tar.addfile(folder)
                for suffix, content in (("jpg", JPEG), ("cls", b"0"), ("txt", b"a picture")):
                    layouts.add_file(tar, f"./{name}{number}.{suffix}", content)
                layouts.add_file(tar, "./README", b"read me")
                layouts.add_file(tar, ".hidden", b"not me")
    index_shards(str(tmp_path / "tars"), tmp_path / "out", labels="own")
    images = IndexedImages(tmp_path / "out", "train")
    assert images.keys(range(3)) == [f"./{name}{number}" for number in range(3)]
    assert images.read_jpegs(range(3)) == [JPEG] * 3
