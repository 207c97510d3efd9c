"""One source in every layout, and what its listing says."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from pipeline.packing.sources import detect
from pipeline.packing.sources.detect import ExistingShards
from pipeline.packing.sources.listing import NOT_ZIPPED, Listing
from tests.packing import layouts

TENCH, SPANIEL, TRUCK = sorted(layouts.WNIDS)


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    return layouts.images(issues=layouts.ISSUES + layouts.BAD_IMAGES)


@pytest.fixture(scope="module")
def tree(images, tmp_path_factory) -> Path:
    return layouts.folder_tree(images, tmp_path_factory.mktemp("tree"))


@pytest.fixture(params=layouts.LAYOUTS)
def layout(request) -> str:
    return request.param


@pytest.fixture
def source(layout, images, tmp_path) -> Path:
    """A source in each of the layouts."""
    return layouts.LAYOUTS[layout](images, tmp_path / "source")


def scan(source: Path, labels: str = "own") -> Listing:
    detected = detect.detect_source(str(source))
    assert not isinstance(detected, ExistingShards)
    return detected.list_images(labels)


def rows(listing: Listing) -> list[dict]:
    return [row for split in ("train", "val") for row in listing.splits[split].to_pylist()]


def content(root: Path, row: dict) -> bytes:
    """The image of a row, read with only the standard library."""
    if row["compression"] == NOT_ZIPPED:
        with (root / row["file"]).open("rb") as file:
            file.seek(row["offset"])
            return file.read(row["size"])
    with zipfile.ZipFile(root / row["file"]) as archive:
        member = next(member for member in archive.infolist() if member.header_offset == row["offset"])
        assert (member.file_size, member.compress_size) == (row["size"], row["stored_size"])
        assert member.compress_type == {1: zipfile.ZIP_STORED, 2: zipfile.ZIP_DEFLATED}[row["compression"]]
        return archive.read(member)
