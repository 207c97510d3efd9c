"""Sources: every layout gives the same listing, and missing, truncated or unexpected files are named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from PIL import Image
from timm.data import ImageNetInfo

from pipeline.base import imagenet
from pipeline.base.errors import ConfigError, SourceError
from pipeline.packing.sources import archives, detect, digits
from pipeline.packing.sources.detect import ExistingShards
from pipeline.packing.sources.listing import IMAGES_SCHEMA, NOT_ZIPPED, Listing
from stages import prepare
from tests.packing import conftest as layouts

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
    found = detect.detect_source(str(source))
    assert not isinstance(found, ExistingShards)
    return found.list_images(labels)


def rows(listing: Listing) -> list[dict]:
    return [row for split in ("train", "val") for row in listing.splits[split].to_pylist()]


def content(root: Path, row: dict) -> bytes:
    """The image of a row, read with only the standard library."""
    if row["zipped"] == NOT_ZIPPED:
        with (root / row["file"]).open("rb") as file:
            file.seek(row["offset"])
            return file.read(row["size"])
    with zipfile.ZipFile(root / row["file"]) as archive:
        member = next(member for member in archive.infolist() if member.header_offset == row["offset"])
        assert (member.file_size, member.compress_size) == (row["size"], row["packed"])
        assert member.compress_type == {1: zipfile.ZIP_STORED, 2: zipfile.ZIP_DEFLATED}[row["zipped"]]
        return archive.read(member)


def test_every_layout_gives_the_same_names_labels_and_sizes(layout, source, tree):
    found, expected = scan(source), scan(tree)
    assert found.layout == layout
    assert found.classes == expected.classes == [TENCH, SPANIEL, TRUCK]
    for split in ("train", "val"):
        assert found.splits[split].schema.equals(IMAGES_SCHEMA)
        for column in ("name", "label", "size"):
            assert found.splits[split][column].to_pylist() == expected.splits[split][column].to_pylist()
        assert found.splits[split]["name"].to_pylist() == sorted(found.splits[split]["name"].to_pylist())


def test_every_image_is_listed_once_at_its_position(source, images):
    found = detect.detect_source(str(source))
    assert not isinstance(found, ExistingShards)
    listing = found.list_images("own")
    assert {row["name"]: content(found.root, row) for row in rows(listing)} == images
    assert len(rows(listing)) == len(images)
    assert all(row["label"] == listing.classes.index(row["name"].split("/")[1]) for row in rows(listing))
    assert {row["file"] for row in rows(listing)} <= {name for name, _ in found.list_files()}


def test_kaggles_zip_has_stored_and_deflated_images(images, tmp_path):
    listing = scan(layouts.kaggle_zip(images, tmp_path / "source"))
    assert {row["zipped"] for row in rows(listing)} == {1, 2}


def test_a_zip_may_be_named_itself(images, tmp_path):
    folder = layouts.kaggle_zip(images, tmp_path / "source")
    path = next(folder.iterdir())
    assert scan(path).splits["train"].equals(scan(folder).splits["train"])


def test_files_change_when_an_image_does(source, images, layout, tmp_path):
    before = detect.detect_source(str(source)).list_files()
    assert before == detect.detect_source(str(source)).list_files()
    more = layouts.images(train=9)
    after = detect.detect_source(str(layouts.LAYOUTS[layout](more, tmp_path / "other"))).list_files()
    assert before != after


# Labels


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


def test_ilsvrc_ids_are_no_labels(images, tmp_path):
    source = layouts.archives(images, tmp_path / "source")
    wnid_of, truth = archives.read_devkit(source / layouts.DEVKIT)
    assert sorted(wnid_of.values()) == [TENCH, SPANIEL, TRUCK]  # the inner synsets are no classes
    listing = scan(source)
    of_number = {row["name"][-13:-5]: row["label"] for row in listing.splits["val"].to_pylist()}
    labels = [of_number[f"{number:08d}"] for number in range(1, len(truth) + 1)]
    assert labels == [listing.classes.index(wnid_of[ilsvrc_id]) for ilsvrc_id in truth]
    assert labels != [ilsvrc_id - 1 for ilsvrc_id in truth]


def test_unknown_classes_have_no_imagenet_label(tmp_path):
    source = layouts.folder_tree(layouts.images(wnids=["tench", "n01443537"]), tmp_path / "source")
    assert scan(source).classes == ["n01443537", "tench"]
    with pytest.raises(SourceError, match=r"none of ImageNet.s .* is called tench: .* data.labels to own"):
        scan(source, "imagenet")


# The official archives


@pytest.mark.parametrize(("name", "purpose"), archives.REQUIRED_FILES.items())
def test_a_missing_archive_is_named_with_what_it_is_for(images, tmp_path, name, purpose):
    source = layouts.archives(images, tmp_path / "source")
    (source / name).unlink()
    with pytest.raises(SourceError, match=rf"{name} \({purpose}\) not found"):
        detect.detect_source(str(source))


def cut_points(path: Path) -> dict[str, int]:
    """Where the tar at `path` may be cut: a place, in words, and the bytes that are left."""
    with tarfile.open(path) as tar:
        first, second, *_, last = tar.getmembers()
        return {
            "in the first header": 100,
            "after the first header": first.offset_data,
            "in the first content": first.offset_data + 1,
            "in the padding of the first content": first.offset_data + first.size,
            "on the second header": second.offset,
            "in the second header": second.offset + 100,
            "after the second header": second.offset_data,
            "in the last content": last.offset_data + last.size // 2,
            "before the end mark": last.offset_data + -(-last.size // 512) * 512,
            "in the end mark": last.offset_data + -(-last.size // 512) * 512 + 10,
            "everywhere": 0,
        }


PLACES = (
    "in the first header",
    "after the first header",
    "in the first content",
    "in the padding of the first content",
    "on the second header",
    "in the second header",
    "after the second header",
    "in the last content",
    "before the end mark",
    "in the end mark",
    "everywhere",
)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [layouts.TRAIN_TAR, layouts.VAL_TAR])
def test_an_archive_that_was_cut_raises_wherever_it_was(images, tmp_path, name, place):
    source = layouts.archives(images, tmp_path / "source")
    os.truncate(source / name, cut_points(source / name)[place])
    with pytest.raises(SourceError, match=f"{name}.* (truncated|damaged).* again"):
        scan(source)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("position", [0, -1])
def test_a_class_tar_that_was_cut_raises_wherever_it_was(images, tmp_path, position, place):
    source = layouts.archives(images, tmp_path / "source")
    outer = source / layouts.TRAIN_TAR
    with tarfile.open(outer) as tar:
        inner = {member.name: tar.extractfile(member).read() for member in tar}  # pyright: ignore
    name = list(inner)[position]
    (tmp_path / name).write_bytes(inner[name])
    inner[name] = inner[name][: cut_points(tmp_path / name)[place]]
    with tarfile.open(outer, "w") as tar:
        for member, bytes_left in inner.items():
            layouts.add_file(tar, member, bytes_left)
    with pytest.raises(SourceError, match=f"{layouts.TRAIN_TAR}: {name} .*(truncated|damaged).* again"):
        scan(source)


def test_a_tar_cut_in_any_block_raises(tmp_path):
    contents = {"a.JPEG": b"a" * 700, "b.JPEG": b"b" * 512, "c.JPEG": b""}
    path, behind = tmp_path / "a.tar", tmp_path / "behind.tar"
    with tarfile.open(path, "w") as tar:
        for name, inside in contents.items():
            layouts.add_file(tar, name, inside)
    whole = path.read_bytes()
    end = whole.rindex(b"ustar") - 257 + 512  # of the last header, whose file is empty
    behind.write_bytes(whole * 2)
    for length in sorted({block + beyond for block in range(0, len(whole), 512) for beyond in (0, 1, 100, 511)}):
        path.write_bytes(whole[:length])
        for found in (
            archives.iter_tar_members(path),
            archives.iter_tar_members(behind, archives.TarMember("inner", 0, length)),
        ):
            member_names = []
            with nullcontext() if length >= end + 512 else pytest.raises(SourceError, match="truncated|damaged"):
                for member in found:
                    member_names.append(member.name)
                    assert member.offset + member.size <= length
            assert member_names == list(contents)[: len(member_names)]
            assert len(member_names) == 3 or length < end + 512


def test_zeros_where_a_header_was_are_not_taken_for_the_end(images, tmp_path):
    source = layouts.archives(images, tmp_path / "source")
    path = source / layouts.VAL_TAR
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2]
    hole = bytearray(path.read_bytes())
    hole[third.offset : third.offset + 512] = bytes(512)
    path.write_bytes(hole)
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 2  # the standard library takes that for the end
    with pytest.raises(SourceError, match=rf"{layouts.VAL_TAR} is damaged at byte {third.offset:,}"):
        scan(source)


def test_an_archive_of_extracted_images_is_refused(images, tmp_path):
    source = layouts.archives(images, tmp_path / "source")
    with tarfile.open(source / layouts.TRAIN_TAR, "w") as tar:
        layouts.add_file(tar, f"train/{TENCH}/{TENCH}_1.JPEG", layouts.jpeg(0))
    with pytest.raises(SourceError, match=f"contains {TENCH}_1.JPEG, but should contain one tar per class"):
        scan(source)


def test_a_class_without_its_tar_is_named(images, tmp_path):
    source = layouts.archives(images, tmp_path / "source")
    fewer = {name: content for name, content in images.items() if TRUCK not in name}
    shutil.copy(layouts.archives(fewer, tmp_path / "fewer") / layouts.TRAIN_TAR, source)
    with pytest.raises(SourceError, match=f"no training images of {TRUCK}, which {layouts.DEVKIT} lists as classes"):
        scan(source)


@pytest.mark.parametrize("spoil", ["cut", "no gzip", "no table", "no truth", "unknown id", "another table"])
def test_an_invalid_devkit_is_named(images, tmp_path, spoil):
    source = layouts.archives(images, tmp_path / "source")
    path = source / layouts.DEVKIT
    table, truth = layouts.meta_mat({TENCH: 3, SPANIEL: 1, TRUCK: 2}), b"1\n2\n3\n"
    if spoil == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif spoil == "no gzip":
        path.write_bytes(b"<html>404</html>")
    else:
        layouts.devkit(
            path,
            {
                "no table": {layouts.TRUTH: truth},
                "no truth": {"data/meta.mat": table},
                "unknown id": {"data/meta.mat": table, layouts.TRUTH: b"1\n4\n"},
                "another table": {"data/meta.mat": b"text" * 100, layouts.TRUTH: truth},
            }[spoil],
        )
    with pytest.raises(SourceError, match=f"{layouts.DEVKIT}"):
        scan(source)


def test_validation_images_without_a_known_class_are_refused(images, tmp_path):
    source = layouts.archives(images, tmp_path / "source")
    layouts.devkit(
        source / layouts.DEVKIT,
        {"data/meta.mat": layouts.meta_mat({TENCH: 3, SPANIEL: 1, TRUCK: 2}), layouts.TRUTH: b"1\n2\n3\n"},
    )
    with pytest.raises(SourceError, match="contains ILSVRC2012_val_00000004.JPEG, but should contain .* to 00000003"):
        scan(source)
    layouts.devkit(
        source / layouts.DEVKIT,
        {"data/meta.mat": layouts.meta_mat({TENCH: 3, SPANIEL: 1, TRUCK: 2}), layouts.TRUTH: b"1\n" * 9},
    )
    with pytest.raises(SourceError, match="contains 6 images, but .* has classes for 9"):
        scan(source)


def test_a_name_that_comes_twice_is_refused(images, tmp_path):
    source = layouts.archives(images, tmp_path / "source")
    inner = tmp_path / f"{TENCH}.tar"
    with tarfile.open(inner, "w") as tar:
        for content in (b"one", b"another"):
            layouts.add_file(tar, f"{TENCH}_3.JPEG", content)
    with tarfile.open(source / layouts.TRAIN_TAR, "w") as tar:
        for wnid in (TENCH, SPANIEL, TRUCK):
            layouts.add_file(tar, f"{wnid}.tar", inner.read_bytes())
    with pytest.raises(SourceError, match=f"train/{TENCH}/{TENCH}_3.JPEG, .*: there are two images of that name"):
        scan(source)


def test_names_of_any_length_and_prefix_are_read_by_the_standard_library(images, tmp_path):
    source = layouts.archives(images, tmp_path / "source")
    image = f"{TENCH}_{'long' * 40}.JPEG"
    with tarfile.open(tmp_path / "inner.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("./folder/"))
        layouts.add_file(tar, f"./{image}", b"content")
    with tarfile.open(source / layouts.TRAIN_TAR) as tar:
        rest = {member.name: tar.extractfile(member).read() for member in tar}  # pyright: ignore
    with tarfile.open(source / layouts.TRAIN_TAR, "w") as tar:
        for name, inner in (rest | {f"{TENCH}.tar": (tmp_path / "inner.tar").read_bytes()}).items():
            layouts.add_file(tar, f"./{name}", inner)
    row = scan(source).splits["train"].to_pylist()[0]
    assert row["name"] == f"train/{TENCH}/{image}" and content(source, row) == b"content"


def test_a_link_in_a_tar_is_refused(images, tmp_path):
    source = layouts.archives(images, tmp_path / "source")
    with tarfile.open(source / layouts.VAL_TAR, "w") as tar:
        link = tarfile.TarInfo("ILSVRC2012_val_00000001.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere.JPEG"
        tar.addfile(link)
    with pytest.raises(SourceError, match="ILSVRC2012_val_00000001.JPEG is a link or a sparse file"):
        scan(source)


# Kaggle


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


# Folder trees


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


# What a source may be


def test_existing_shards_are_distinguished_from_archives(images, tmp_path):
    shards = detect.detect_source(str(layouts.shards(images, tmp_path / "shards")))
    assert shards == ExistingShards(str(tmp_path / "shards"))
    assert ("imagenet1k-validation-0000.tar" in dict(shards.list_files())) and shards.layout == "WebDataset shards"
    assert detect.detect_source(str(layouts.archives(images, tmp_path / "archives"))).layout == "the official archives"
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "manifest.json").write_text("{}")
    assert detect.detect_source(str(tmp_path / "ours")) == ExistingShards(str(tmp_path / "ours"))
    assert detect.detect_source("s3://bucket/imagenet") == ExistingShards("s3://bucket/imagenet")


def test_an_unsupported_source_is_reported_with_all_layouts(tree, images, tmp_path):
    with pytest.raises(SourceError, match="missing data folder: .*nowhere not found. Set data.source .* to one of: "):
        detect.detect_source(str(tmp_path / "nowhere"))
    with pytest.raises(SourceError, match="contains nothing, which is not a supported layout. Set data.source"):
        detect.detect_source(str(tmp_path))
    with pytest.raises(SourceError, match=rf"which is not a supported layout, but {tree} is a folder tree. Set"):
        detect.detect_source(str(tree / "train"))
    shutil.copytree(tree, tmp_path / "deeper" / "imagenette2")
    with pytest.raises(SourceError, match="contains imagenette2, .*, but .*deeper/imagenette2 is a folder tree"):
        detect.detect_source(str(tmp_path / "deeper"))
    kaggle = layouts.kaggle_folder(images, tmp_path / "kaggle")
    with pytest.raises(SourceError, match=f"contains Annotations, Data, .*, but {kaggle} is Kaggle's folder"):
        detect.detect_source(str(kaggle / "ILSVRC"))
    (tmp_path / "imagenette2.tgz").touch()
    with pytest.raises(SourceError, match="imagenette2.tgz is a file of an unsupported kind: extract it"):
        detect.detect_source(str(tmp_path / "imagenette2.tgz"))
    (tmp_path / layouts.TRAIN_TAR).touch()
    with pytest.raises(SourceError, match=f"one of ImageNet's archives: set data.source to its folder, {tmp_path}"):
        detect.detect_source(str(tmp_path / layouts.TRAIN_TAR))


# The prepare stage


def test_the_summary_changes_with_names_and_sizes_only(images, tmp_path):
    source = layouts.folder_tree(images, tmp_path / "source")

    def summary() -> dict:
        return prepare.summarize_source(detect.detect_source(str(source)))

    before = summary()
    assert before["layout"] == "a folder tree"
    assert (before["files"], before["bytes"]) == (len(images), sum(map(len, images.values())))
    image = source / "train" / TENCH / f"{TENCH}_3.JPEG"
    os.utime(image, (0, 0))
    assert summary() == before
    image.write_bytes(image.read_bytes() + b"more")
    grown = summary()
    image.rename(image.with_name("renamed.JPEG"))
    assert len({entry["sha256"] for entry in (before, grown, summary())}) == 3


def test_digits_are_written_once_and_split_by_class(tmp_path):
    digits.write_digits(tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg")}
    counts = Counter(path.parts[-3] for path in written)
    assert counts == {"train": 1437, "val": 360}
    of_class = Counter(path.parts[-2] for path in written if "val" in path.parts)
    assert len(of_class) == 10 and set(of_class.values()) <= {35, 36, 37}
    with Image.open(min(written)) as image:
        assert image.size == (32, 32)

    gone, kept = sorted(written)[:2]
    image = gone.read_bytes()
    gone.unlink()
    before = detect.detect_source(str(tmp_path)).list_files()
    digits.write_digits(tmp_path)
    assert gone.read_bytes() == image
    assert kept.stat().st_mtime_ns == written[kept]
    assert detect.detect_source(str(tmp_path)).list_files() != before


def test_digits_do_not_mix_with_images_of_others(images, tmp_path):
    layouts.folder_tree(images, tmp_path)
    with pytest.raises(ConfigError, match=r"train/.*JPEG is not part of the digits"):
        digits.write_digits(tmp_path)
    assert not list(tmp_path.rglob("*.jpg"))


def prepared(root: Path, folder: Path, source: str) -> subprocess.CompletedProcess[str]:
    """The prepare stage, run in a folder for that source."""
    params = (root / "params.yaml").read_text()
    (folder / "params.yaml").write_text(
        params.replace("name: digits ", "name: mine ").replace("data/source/digits", source)
    )
    return subprocess.run(
        [sys.executable, "-m", "stages.prepare"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )


def test_the_prepare_stage_logs_the_detected_layout(root, images, tmp_path):
    layouts.archives(images, tmp_path / "imagenet")
    ended = prepared(root, tmp_path, "imagenet")
    assert ended.returncode == 0
    assert ended.stderr == "imagenet: the official archives, 3 files, 0.1 MB\n" and not ended.stdout
    assert json.loads((tmp_path / "data" / "source.json").read_text())["layout"] == "the official archives"


def test_a_missing_source_is_reported_on_the_command_line(root, tmp_path):
    ended = prepared(root, tmp_path, "data/source/mine")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: missing data folder: data/source/mine not found. Set data.source")
    assert "Traceback" not in ended.stderr and not (tmp_path / "data").exists()
