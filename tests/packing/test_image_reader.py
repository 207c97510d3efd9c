"""Sources that changed since they were listed are named."""

from __future__ import annotations

import os

import pytest

from pipeline.base.errors import SourceError
from pipeline.packing import pack
from pipeline.packing.sources.detect import detect_source
from tests.packing import layouts


@pytest.mark.parametrize("layout", ["a folder tree", "Kaggle's zip", "the official archives"])
def test_a_source_that_shrank_since_it_was_listed_is_named(images, tmp_path, layout):
    source = layouts.LAYOUTS[layout](images, tmp_path / "source")
    detected = detect_source(str(source))
    listing = detected.list_images("own")
    for path in source.rglob("*"):
        if path.suffix in (".JPEG", ".zip", ".tar"):
            os.truncate(path, path.stat().st_size // 4)
    with pytest.raises(SourceError, match=r"source/.* is shorter than when it was listed: it ends at byte \d+, within"):
        pack.pack_listing(listing, detected.root, tmp_path / "out", source="", images_per_shard=4, seed=0)


def test_an_archive_that_is_gone_since_it_was_listed_is_named(images, tmp_path):
    detected = detect_source(str(layouts.archives(images, tmp_path / "source")))
    listing = detected.list_images("own")
    (tmp_path / "source" / layouts.TRAIN_TAR).unlink()
    with pytest.raises(SourceError, match=f"{layouts.TRAIN_TAR} cannot be read: No such file"):
        pack.pack_listing(listing, detected.root, tmp_path / "out", source="", images_per_shard=4, seed=0)


def test_a_zip_that_is_damaged_is_named(images, tmp_path):
    source = layouts.kaggle_zip(images, tmp_path / "source")
    detected = detect_source(str(source))
    listing = detected.list_images("own")
    (path,) = source.glob("*.zip")
    content = bytearray(path.read_bytes())
    for table in listing.splits.values():
        for row in table.to_pylist():
            content[row["offset"] : row["offset"] + 4] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"challenge.zip is damaged: no member of the zip at byte \d+"):
        pack.pack_listing(listing, detected.root, tmp_path / "out", source="", images_per_shard=4, seed=0)
