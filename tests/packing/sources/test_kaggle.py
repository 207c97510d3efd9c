"""Kaggle's folder and zip: files and tables that do not fit are named."""

from __future__ import annotations

import os
import shutil
import zipfile

import pytest

from pipeline.base.errors import SourceError
from pipeline.packing.sources import detect
from tests.packing import layouts
from tests.packing.sources.conftest import TENCH, rows, scan


def test_kaggles_zip_has_stored_and_deflated_images(images, tmp_path):
    listing = scan(layouts.kaggle_zip(images, tmp_path / "source"))
    assert {row["compression"] for row in rows(listing)} == {1, 2}


def test_a_zip_may_be_named_itself(images, tmp_path):
    folder = layouts.kaggle_zip(images, tmp_path / "source")
    path = next(folder.iterdir())
    assert scan(path).splits["train"].equals(scan(folder).splits["train"])


@pytest.mark.parametrize("name", ["LOC_val_solution.csv", "LOC_synset_mapping.txt", "ILSVRC/Data/CLS-LOC/val"])
def test_missing_files_of_kaggles_folder_are_named(images, tmp_path, name):
    source = layouts.kaggle_folder(images, tmp_path / "source")
    (source / name).rename(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match=rf"{name} \(.*\) not found: set data.source to the folder with"):
        detect.detect_source(str(source))


def test_kaggles_inner_folders_lead_to_the_outer_one(images, tmp_path):
    source = layouts.kaggle_folder(images, tmp_path / "source")
    with pytest.raises(SourceError, match=f"these are Kaggle's files: set data.source to {source}$"):
        detect.detect_source(str(source / layouts.CLS_LOC))
    (source / layouts.CLS_LOC / "val" / TENCH).mkdir()
    with pytest.raises(SourceError, match=f"sorted by class, set data.source to {source / layouts.CLS_LOC}$"):
        detect.detect_source(str(source))


@pytest.mark.parametrize("build", [layouts.kaggle_folder, layouts.kaggle_zip])
def test_kaggles_validation_images_and_table_must_agree(images, tmp_path, build, monkeypatch):
    files = layouts.kaggle_files(images)
    monkeypatch.setattr(layouts, "kaggle_files", lambda images: files)
    place = f"{layouts.CLS_LOC}/val/ILSVRC2012_val_0000000"
    files[f"{place}9.JPEG"] = files[f"{place}2.JPEG"]
    with pytest.raises(SourceError, match=r"00000009.JPEG is not in LOC_val_solution.csv"):
        scan(build(images, tmp_path / "more"))
    del files[f"{place}9.JPEG"], files[f"{place}2.JPEG"]
    with pytest.raises(SourceError, match=r"images of LOC_val_solution.csv are missing .*: ILSVRC2012_val_00000002;"):
        scan(build(images, tmp_path / "fewer"))


@pytest.mark.parametrize("table", [b"", b"Id,Class\n1,2\n", b"ImageId,PredictionString\nname,\n", b"\xff"])
def test_a_table_that_is_not_kaggles_is_named(images, tmp_path, table):
    source = layouts.kaggle_folder(images, tmp_path / "source")
    (source / "LOC_val_solution.csv").write_bytes(table)
    with pytest.raises(SourceError, match="LOC_val_solution.csv"):
        scan(source)


def test_a_zip_that_was_cut_or_is_not_kaggles_is_refused(images, tmp_path):
    path = next(layouts.kaggle_zip(images, tmp_path / "source").iterdir())
    size = path.stat().st_size
    for left in (0, 100, size // 2, size - 30, size - 1):
        shutil.copy(path, tmp_path / "cut.zip")
        os.truncate(tmp_path / "cut.zip", left)
        with pytest.raises(SourceError, match="cut.zip is truncated"):
            scan(tmp_path / "cut.zip")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("train/cat/0.jpg", layouts.jpeg(0))
    with pytest.raises(SourceError, match="contains no LOC_val_solution.csv and no .* not Kaggle's: extract it"):
        scan(tmp_path / "other.zip")


def test_a_zip_packed_by_another_method_is_refused(images, tmp_path):
    path = next(layouts.kaggle_zip(images, tmp_path / "source").iterdir())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{layouts.CLS_LOC}/train/{TENCH}/{TENCH}_99.JPEG", layouts.jpeg(0), zipfile.ZIP_LZMA)
    with pytest.raises(SourceError, match=f"{TENCH}_99.JPEG is encrypted, or has a compression method"):
        scan(path)
