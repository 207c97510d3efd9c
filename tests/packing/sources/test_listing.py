"""Sources: every layout gives the same listing, and missing, truncated or unexpected files are named."""

from __future__ import annotations

import zipfile

import pytest
from timm.data import ImageNetInfo

from pipeline.base import imagenet
from pipeline.base.errors import SourceError
from pipeline.packing.sources import detect
from pipeline.packing.sources.detect import ExistingShards
from pipeline.packing.sources.listing import IMAGES_SCHEMA
from tests.packing import layouts
from tests.packing.sources.conftest import SPANIEL, TENCH, TRUCK, content, rows, scan


def test_every_layout_gives_the_same_names_labels_and_sizes(layout, source, tree):
    listing, expected = scan(source), scan(tree)
    assert listing.layout == layout
    assert listing.classes == expected.classes == [TENCH, SPANIEL, TRUCK]
    for split in ("train", "val"):
        assert listing.splits[split].schema.equals(IMAGES_SCHEMA)
        for column in ("name", "label", "size"):
            assert listing.splits[split][column].to_pylist() == expected.splits[split][column].to_pylist()
        assert listing.splits[split]["name"].to_pylist() == sorted(listing.splits[split]["name"].to_pylist())


def test_every_image_is_listed_once_at_its_position(source, images):
    detected = detect.detect_source(str(source))
    assert not isinstance(detected, ExistingShards)
    listing = detected.list_images("own")
    assert {row["name"]: content(detected.root, row) for row in rows(listing)} == images
    assert len(rows(listing)) == len(images)
    assert all(row["label"] == listing.classes.index(row["name"].split("/")[1]) for row in rows(listing))
    assert {row["file"] for row in rows(listing)} <= {name for name, _ in detected.list_files()}


def test_files_change_when_an_image_does(source, images, layout, tmp_path):
    before = detect.detect_source(str(source)).list_files()
    assert before == detect.detect_source(str(source)).list_files()
    more = layouts.images(train=9)
    after = detect.detect_source(str(layouts.LAYOUTS[layout](more, tmp_path / "other"))).list_files()
    assert before != after


def test_labels_of_imagenet_are_timms(tree):
    table = ImageNetInfo().label_names()
    assert list(imagenet.wnids()) == table == sorted(table)
    listing = scan(tree, "imagenet")
    assert listing.classes == table
    label_of = {row["name"].split("/")[1]: row["label"] for row in rows(listing)}
    assert label_of == {TENCH: 0, SPANIEL: 217, TRUCK: 569}


def test_all_thousand_classes_have_imagenets_labels_under_either_name(tmp_path, caplog):
    one = layouts.jpeg(0)
    source = layouts.folder_tree(
        {f"{split}/{wnid}/0.JPEG": one for split in ("train", "val") for wnid in imagenet.wnids()}, tmp_path / "source"
    )
    own, imagenets = scan(source, "own"), scan(source, "imagenet")
    assert own.classes == imagenets.classes == list(imagenet.wnids())
    assert own.splits["val"]["label"].to_pylist() == list(range(1000))
    assert own.splits["train"].equals(imagenets.splits["train"])
    assert "train has 1,000 images instead of 1,281,167" in caplog.text


def test_a_table_in_another_order_is_not_trusted(tmp_path, monkeypatch):
    names = imagenet.wnids()
    empty = {f"{split}/{wnid}/0.JPEG": b"" for split in ("train", "val") for wnid in names}
    source = layouts.folder_tree(empty, tmp_path)
    monkeypatch.setattr(imagenet, "wnids", lambda: names[::-1])
    with pytest.raises(SourceError, match="timm's table of ImageNet's classes is not in the order of the wnids"):
        scan(source)


def test_unknown_classes_have_no_imagenet_label(tmp_path):
    source = layouts.folder_tree(layouts.images(wnids=["tench", "n01443537"]), tmp_path / "source")
    assert scan(source).classes == ["n01443537", "tench"]
    with pytest.raises(SourceError, match=r"none of ImageNet.s .* is called tench: .* data.labels to own"):
        scan(source, "imagenet")


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_files_that_systems_and_editors_add_are_skipped(layout, tmp_path):
    source = layouts.LAYOUTS[layout](layouts.images(), tmp_path / "source")
    before = detect.detect_source(str(source))
    listing = before.list_images("own")
    for folder in [source, *(path for path in source.rglob("*") if path.is_dir())]:
        for name in ("._x.jpg", ".DS_Store", "._ILSVRC2012_img_train.tar", "._a.zip"):
            (folder / name).write_bytes(b"\0\5\x16\7 AppleDouble")
        for name in (".ipynb_checkpoints", "__MACOSX"):
            (folder / name).mkdir()
            (folder / name / "x-checkpoint.jpg").write_bytes(b"")
    if layout == "Kaggle's zip":
        with zipfile.ZipFile(next(source.glob("[a-z]*.zip")), "a") as archive:
            for split in ("train/n01440764", "val"):
                archive.writestr(f"ILSVRC/Data/CLS-LOC/{split}/._x.JPEG", b"")
    after = detect.detect_source(str(source))
    assert (after, after.list_images("own").splits) == (before, listing.splits)
