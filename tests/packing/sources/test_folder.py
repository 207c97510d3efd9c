"""Folder trees: links, other files, and trees of another shape."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager

import pytest

from pipeline.base.errors import SourceError
from pipeline.packing.sources import detect
from stages import prepare
from tests.packing import layouts
from tests.packing.sources.conftest import TENCH, rows, scan


def test_the_order_in_which_a_folder_is_listed_does_not_matter(tree, monkeypatch):
    expected, scandir = scan(tree), os.scandir

    @contextmanager
    def reversed_scandir(path):
        with scandir(path) as entries:
            yield sorted(entries, key=lambda entry: entry.name, reverse=True)

    monkeypatch.setattr(os, "scandir", reversed_scandir)
    assert scan(tree).splits["train"].equals(expected.splits["train"])


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_split_under_another_name_is_reported(images, tmp_path, name):
    source = layouts.folder_tree(images, tmp_path / "source")
    (source / "val").rename(source / name)
    with pytest.raises(SourceError, match=rf"source/val not found: .*; {source / name} exists: .* `ln -s {name} "):
        detect.detect_source(str(source))


def test_links_are_followed_and_broken_links_are_named(images, tmp_path):
    real = layouts.folder_tree(images, tmp_path / "real")
    source = tmp_path / "source"
    shutil.copytree(real / "val", source / "validation")
    (source / "val").symlink_to("validation")
    (source / "train").mkdir()
    for wnid in layouts.WNIDS:
        (source / "train" / wnid).symlink_to(real / "train" / wnid)
    assert scan(source).splits["train"].equals(scan(real).splits["train"])
    link = real / "train" / TENCH / "link.jpg"
    link.symlink_to("nowhere.jpg")
    with pytest.raises(SourceError, match=f"train/{TENCH}/link.jpg is a broken link"):
        scan(source)


def test_other_files_are_listed_as_ignored_and_hidden_files_are_skipped(images, tmp_path):
    source = layouts.folder_tree(images, tmp_path / "source")
    (source / "train" / "index.csv").touch()
    (source / "train" / TENCH / "notes.txt").touch()
    (source / "train" / TENCH / ".DS_Store").touch()
    (source / "val" / ".ipynb_checkpoints").mkdir()
    listing = scan(source)
    assert listing.ignored == ["train/index.csv", f"train/{TENCH}/notes.txt"]
    assert len(rows(listing)) == len(images)


def test_a_name_that_is_not_utf8_is_refused(images, tmp_path):
    source = layouts.folder_tree(images, tmp_path / "source")
    path = os.fsencode(source / "train" / TENCH) + b"/\xff.jpg"
    try:
        open(path, "wb").close()
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    prepare.summarize_source(detect.detect_source(str(source)))
    with pytest.raises(SourceError, match=r"udcff.jpg': the name is not valid UTF-8: rename the file"):
        scan(source)


def test_a_tree_of_another_shape_is_refused(images, tmp_path):
    source = layouts.folder_tree(images, tmp_path / "source")
    loose, nested = source / "val" / "0.jpg", source / "train" / TENCH / "images"
    loose.write_bytes(layouts.jpeg(0))
    with pytest.raises(SourceError, match="val contains 0.jpg outside of the class folders"):
        scan(source)
    loose.unlink()
    nested.mkdir()
    with pytest.raises(
        SourceError, match=f"train/{TENCH}/images is a folder: the images of a class must be directly in"
    ):
        scan(source)
    nested.rmdir()
    (source / "val" / "n00000001").mkdir()
    shutil.copy(source / "val" / TENCH / "ILSVRC2012_val_00000001.JPEG", source / "val" / "n00000001")
    with pytest.raises(SourceError, match="n00000001: not among the classes that has a folder in .*train"):
        scan(source)
    (source / "train" / "n00000001").mkdir()
    with pytest.raises(SourceError, match="no training images of n00000001, which has a folder in .*train"):
        scan(source)


def test_a_split_without_classes_is_refused(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    (tmp_path / "train" / "part-0.tar").touch()
    with pytest.raises(SourceError, match="train contains part-0.tar, but should contain a folder for each class"):
        detect.detect_source(str(tmp_path))
