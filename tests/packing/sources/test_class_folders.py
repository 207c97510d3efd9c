"""Folders of classes without a split: a fifth of each class is for validation, whatever else is there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from pipeline.base.errors import SourceError
from pipeline.packing.sources import detect
from tests.packing import layouts
from tests.packing.sources.conftest import scan

NUM_IMAGES = {"forest": 10, "river": 20, "sea_lake": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder like EuroSAT's, with a file beside the classes."""
    for name, count in NUM_IMAGES.items():
        (tmp_path / "2750" / name).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "2750" / name / f"{name}_{number}.jpg").write_bytes(layouts.jpeg(number))
    (tmp_path / "2750" / "label_map.json").touch()
    return tmp_path / "2750"


def names(folder: Path) -> dict[str, list[str]]:
    return {split: images["name"].to_pylist() for split, images in scan(folder).splits.items()}


def test_a_fifth_of_every_class_is_for_validation(folder: Path) -> None:
    listing = scan(folder)
    assert listing.classes == sorted(NUM_IMAGES) and listing.ignored == ["label_map.json"]
    counts = {split: Counter(name.split("/")[1] for name in found) for split, found in names(folder).items()}
    assert counts == {
        "train": {"forest": 8, "river": 16, "sea_lake": 1},
        "val": {"forest": 2, "river": 4, "sea_lake": 1},
    }
    assert listing.splits["val"]["file"].to_pylist()[0].startswith("forest/forest_")


def test_the_split_depends_on_the_names_of_the_images_of_a_class_only(folder: Path) -> None:
    before = names(folder)
    (folder / "highway").mkdir()
    (folder / "highway" / "0.jpg").write_bytes(layouts.jpeg(0))
    after = names(folder.rename(folder.with_name("EuroSAT_RGB")))
    assert after["val"] == before["val"]
    assert set(after["train"]) - set(before["train"]) == {"train/highway/0.jpg"}


def test_one_split_of_a_tree_and_images_beside_the_classes_are_refused(folder: Path) -> None:
    (folder / "stray.jpg").write_bytes(layouts.jpeg(0))
    with pytest.raises(SourceError, match="contains stray.jpg outside of the class folders"):
        scan(folder)
    train = folder.rename(folder.with_name("train"))
    with pytest.raises(SourceError, match="not a supported layout"):
        detect.detect_source(str(train))
