"""The official archives: missing, truncated, damaged and unexpected files are named."""

from __future__ import annotations

import os
import shutil
import tarfile
from contextlib import nullcontext
from pathlib import Path

import pytest

from pipeline.base.errors import SourceError
from pipeline.packing.sources import archives, detect
from tests.packing import layouts
from tests.packing.sources.conftest import SPANIEL, TENCH, TRUCK, content, scan


def test_ilsvrc_ids_are_no_labels(images, tmp_path):
    source = layouts.archives(images, tmp_path / "source")
    wnid_of, truth = archives.read_devkit(source / layouts.DEVKIT)
    assert sorted(wnid_of.values()) == [TENCH, SPANIEL, TRUCK]  # the inner synsets are no classes
    listing = scan(source)
    of_number = {row["name"][-13:-5]: row["label"] for row in listing.splits["val"].to_pylist()}
    labels = [of_number[f"{number:08d}"] for number in range(1, len(truth) + 1)]
    assert labels == [listing.classes.index(wnid_of[ilsvrc_id]) for ilsvrc_id in truth]
    assert labels != [ilsvrc_id - 1 for ilsvrc_id in truth]


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
        for members in (
            archives.iter_tar_members(path),
            archives.iter_tar_members(behind, archives.TarMember("inner", 0, length)),
        ):
            member_names = []
            with nullcontext() if length >= end + 512 else pytest.raises(SourceError, match="truncated|damaged"):
                for member in members:
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


def test_hidden_members_of_the_official_archives_are_skipped(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("._x.JPEG", "x.JPEG"):
            layouts.add_file(tar, name, b"12")
    assert [member.name for member in archives.iter_tar_members(tmp_path / "a.tar")] == ["x.JPEG"]
