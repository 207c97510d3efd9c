"""Packing: the same bytes for the same images, complete files only, readable by webdataset, and clear errors."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import webdataset

from pipeline.base.errors import ShardError, SourceError
from pipeline.packing import image_reader, pack, shard_layout, shard_task
from pipeline.packing.sources.detect import detect_source
from pipeline.shards import verify
from pipeline.shards.manifests import Shards
from tests.packing import layouts
from tests.packing.conftest import contents, members, modification_times, names, write_shards

SOURCE_ONLY = ("source", "layout", "ignored")  # fields of a manifest that describe the source


@pytest.mark.parametrize("build", layouts.LAYOUTS.values(), ids=layouts.LAYOUTS)
def test_shards_are_the_same_bytes_from_every_layout(build: Callable, tmp_path):
    images = layouts.images(issues=layouts.ISSUES + layouts.BAD_IMAGES)
    expected = write_shards(layouts.folder_tree(images, tmp_path / "tree"), tmp_path / "a", on_bad_image="skip")
    manifest = write_shards(build(images, tmp_path / "other"), tmp_path / "b", on_bad_image="skip")
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    assert len(manifest.shards) == 8 and manifest.counts == {"train": 19, "val": 6}
    assert {**asdict(manifest), **dict.fromkeys(SOURCE_ONLY)} == {**asdict(expected), **dict.fromkeys(SOURCE_ONLY)}


def test_seed_changes_the_order_of_training_images_and_nothing_else(source, tmp_path):
    write_shards(source, tmp_path / "a", seed=0)
    write_shards(source, tmp_path / "b", seed=1)
    train = [names(tmp_path / name, "train-*.tar") for name in "ab"]
    assert sorted(train[0]) == sorted(train[1]) != train[0] != train[1]
    assert dict(sorted((m.name, content) for m, content in members(tmp_path / "a"))) == dict(
        sorted((m.name, content) for m, content in members(tmp_path / "b"))
    )
    val = names(tmp_path / "a", "val-*.tar")
    assert val[::2] == sorted(val[::2]) == names(tmp_path / "b", "val-*.tar")[::2]
    classes = [name.split("/")[1] for name in train[0][::2]]
    assert classes != sorted(classes)


def test_index_points_at_the_verbatim_jpeg(images, source, tmp_path):
    manifest = write_shards(source, tmp_path / "out")
    for split in ("train", "val"):
        rows = pq.read_table(tmp_path / "out" / f"{split}.index.parquet").to_pylist()
        assert list(rows[0]) == ["key", "shard", "offset", "size", "label"]
        assert sorted(row["key"] for row in rows) == sorted(
            name.removesuffix(".JPEG") for name in images if name.startswith(split)
        )
        for row in rows:
            tar = (tmp_path / "out" / row["shard"]).read_bytes()
            assert manifest.classes[row["label"]] == row["key"].split("/")[1]
            if not row["key"].endswith("png"):
                assert tar[row["offset"] : row["offset"] + row["size"]] == images[f"{row['key']}.JPEG"]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves that to the collector
def test_plain_webdataset_reads_the_tars_in_the_index_order(source, tmp_path):
    write_shards(source, tmp_path / "out")
    urls = [str(path) for path in sorted((tmp_path / "out").glob("train-*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    rows = pq.read_table(tmp_path / "out" / "train.index.parquet").to_pylist()
    assert [(s["__key__"], int(s["cls"]), len(s["jpg"])) for s in samples] == [
        (row["key"], row["label"], row["size"]) for row in rows
    ]


def test_tar_headers_hold_no_user_or_time(source, tmp_path):
    write_shards(source, tmp_path / "out")
    assert (tmp_path / "out" / "val-000000.tar").read_bytes()[257:265] == b"ustar\x0000"
    for member, _ in members(tmp_path / "out"):
        assert (member.uid, member.gid, member.mtime, member.uname, member.gname) == (0, 0, 0, "", "")


def test_image_issues_are_listed_and_other_formats_become_jpegs(source, tmp_path):
    (source / "train" / layouts.WNIDS[0] / "drawing.v2.png").write_bytes(layouts.issue_image("png"))
    (source / "train" / layouts.WNIDS[0] / "notes.txt").write_text("no image")
    manifest = write_shards(source, tmp_path / "out")
    assert manifest.oddities == {"cmyk": 1, "exif-rotated": 1, "grayscale": 1, "png": 2}
    assert manifest.skipped == {}
    assert manifest.ignored == [f"train/{layouts.WNIDS[0]}/notes.txt"]
    assert (tmp_path / "out" / pack.ISSUES_FILE).read_text().splitlines() == [
        "name,oddity,done",
        f"train/{layouts.WNIDS[0]}/drawing.v2.png,png,encoded as JPEG",
        f"{layouts.issue_name('cmyk')},cmyk,kept as it is",
        f"{layouts.issue_name('grayscale')},grayscale,kept as it is",
        f"{layouts.issue_name('png')},png,encoded as JPEG",
        f"{layouts.issue_name('rotated')},exif-rotated,kept as it is",
    ]
    assert f"train/{layouts.WNIDS[0]}/drawing_v2.jpg" in names(tmp_path / "out", "train-*.tar")
    for member, content in members(tmp_path / "out"):
        assert member.name.endswith(".cls") or content.startswith(b"\xff\xd8")


def test_bad_images_are_named_together_and_the_other_shards_are_kept(source, tmp_path):
    for kind in layouts.BAD_IMAGES:
        (source / layouts.issue_name(kind)).write_bytes(layouts.issue_image(kind))
    out = tmp_path / "out"
    with pytest.raises(SourceError) as caught:
        write_shards(source, out)
    assert str(caught.value).splitlines() == [
        "3 of the images cannot be decoded:",
        f"  {layouts.issue_name('empty')}: empty",
        f"  {layouts.issue_name('text')}: not an image",
        f"  {layouts.issue_name('truncated')}: truncated",
        "  replace or remove them, or set data.on_bad_image to skip; shards without a bad image are kept",
    ]
    kept = modification_times(out)
    assert not (out / "manifest.json").exists() and 3 <= len(kept) < 8
    manifest = write_shards(source, out, on_bad_image="skip")
    assert manifest.skipped == {
        layouts.issue_name("empty"): "empty",
        layouts.issue_name("text"): "not an image",
        layouts.issue_name("truncated"): "truncated",
    }
    assert manifest.counts == {"train": 19, "val": 6}
    assert {name: modification_times(out)[name] for name in kept} == kept
    with pytest.raises(SourceError, match="3 of the images cannot be decoded"):
        write_shards(source, out)


def test_a_bad_image_changes_only_its_own_shard(images, source, tmp_path):
    good = write_shards(source, tmp_path / "good")
    (source / layouts.issue_name("cmyk")).write_bytes(b"")
    bad = write_shards(source, tmp_path / "bad", on_bad_image="skip")
    different = [name for name in good.shards if good.shards[name] != bad.shards[name]]
    assert len(different) == 1 and good.shards.keys() == bad.shards.keys()
    for entries in (good.shards, bad.shards):
        assert all(set(entry) == {"size", "xxh3"} for entry in entries.values())


def test_many_bad_images_are_counted(source, tmp_path):
    for number in range(25):
        (source / "val" / layouts.WNIDS[1] / f"{number:02d}.jpg").write_bytes(b"")
    with pytest.raises(SourceError, match=r"(?s)^25 of the images.*19.jpg: empty\n  ... and 5 more\n"):
        write_shards(source, tmp_path / "out")


def test_keys_that_clash_are_refused(source, tmp_path):
    folder = source / "train" / layouts.WNIDS[1]
    for name in ("a.b.jpg", "a_b.jpg"):
        (folder / name).write_bytes(layouts.jpeg(0))
    with pytest.raises(SourceError, match=r"/a.b.jpg and train/.*/a_b.jpg would both have the key .*/a_b: rename"):
        write_shards(source, tmp_path / "out")


def test_a_name_too_long_for_a_tar_is_refused_before_anything_is_written(source, tmp_path):
    folder = source / "val" / layouts.WNIDS[1]
    (folder / f"{'ü' * 60}.jpg").write_bytes(layouts.jpeg(0))
    with pytest.raises(
        SourceError, match="ü{60}.jpg: the name is too long .* 100 for the file: .* ü{60}.jpg 124 .in UTF-8"
    ):
        write_shards(source, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tar"))
    (folder / f"{'ü' * 60}.jpg").rename(folder / f"{'ü' * 48}.jpg")  # 100 bytes
    assert write_shards(source, tmp_path / "out", on_bad_image="skip")
    with tarfile.open(tmp_path / "out" / "val-000000.tar") as tar:
        assert f"val/{layouts.WNIDS[1]}/{'ü' * 48}.jpg" in tar.getnames()


def test_finished_shards_are_kept_and_damaged_ones_rewritten(source, tmp_path):
    out = tmp_path / "out"
    manifest = write_shards(source, out)
    before, written = contents(out), modification_times(out)
    assert write_shards(source, out) == manifest
    assert (contents(out), modification_times(out)) == (before, written)
    flipped = bytearray(before["train-000001.tar"])
    flipped[700] ^= 1
    (out / "train-000001.tar").write_bytes(flipped)
    (out / "train-000003.tar").unlink()
    (out / "val-000000.tar").write_bytes(before["val-000000.tar"][:-512])
    (out / shard_task.RECORDS_DIR / "train-000002.tar.parquet").write_bytes(b"no record")
    assert write_shards(source, out) == manifest
    assert contents(out) == before
    changed = [name for name, touched in modification_times(out).items() if touched != written[name]]
    assert sorted(changed) == ["train-000001.tar", "train-000002.tar", "train-000003.tar", "val-000000.tar"]


def test_a_changed_image_rewrites_only_its_own_shard(source, tmp_path):
    out = tmp_path / "out"
    write_shards(source, out)
    written = modification_times(out)
    (source / layouts.issue_name("cmyk")).write_bytes(layouts.jpeg(3) + b"\0")
    write_shards(source, out)
    write_shards(source, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")
    assert sum(touched != written[name] for name, touched in modification_times(out).items()) == 1


def test_another_source_or_seed_removes_stale_files(source, tmp_path):
    out = tmp_path / "out"
    write_shards(source, out)
    (out / "train-000000.tar.0a1b2c3d.partial").write_bytes(b"of a run that was killed")
    for path in (source / "train" / layouts.WNIDS[0]).iterdir():
        path.unlink() if path.stem.endswith(tuple(layouts.ISSUES)) else None
    write_shards(source, out, seed=1)
    write_shards(source, tmp_path / "fresh", seed=1)
    assert contents(out) == contents(tmp_path / "fresh")
    assert {path.name for path in (out / shard_task.RECORDS_DIR).iterdir()} == {
        f"{name}.parquet" for name in modification_times(out)
    }


def test_missing_disk_space_is_reported_before_writing(source, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def free(num_bytes: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=num_bytes))

    free(50_000)
    with pytest.raises(
        ShardError, match=r"not enough disk space in .*out: .* need 0.1 MB more and 0.1 MB are free. Free some"
    ):
        write_shards(source, out)
    assert not modification_times(out)
    free(100_000_000)
    write_shards(source, out)
    free(50_000)
    write_shards(source, out)  # existing shards need no more space


def test_a_full_disk_is_reported_and_leaves_no_partial_shard(source, tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(image_reader.os, "write", full)
        with pytest.raises(ShardError, match=r"train-000000.tar cannot be written: No space left on device"):
            write_shards(source, tmp_path / "out")
    assert not modification_times(tmp_path / "out") and not list((tmp_path / "out").rglob("*.partial"))
    write_shards(source, tmp_path / "out")


def test_a_task_carries_only_the_rows_of_its_own_shard(source, tmp_path):
    detected = detect_source(str(source))
    listing = detected.list_images("own")

    def largest(images_per_shard: int) -> int:
        layout = shard_layout.ShardLayout(
            listing, source, tmp_path, images_per_shard=images_per_shard, seed=0, skip_bad_images=False
        )
        return max(len(pickle.dumps(task)) for task in layout.tasks())

    assert largest(1) + 50 * 10 < largest(19)


def test_the_command_line_finds_and_rewrites_damaged_shards(root, source, tmp_path):
    params = (root / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(
        params.replace("name: digits ", "name: mine ")
        .replace("data/source/digits", "source")
        .replace("images_per_shard: 512", "images_per_shard: 4")
    )
    out = tmp_path / "data/shards/mine"

    def run(stage: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", f"stages.{stage}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(root)},
        )

    ended = run("shard")
    assert ended.returncode == 0, ended.stderr
    assert "19 training and 6 validation images of 3 classes in 7 shards" in ended.stderr
    assert "oddities.csv lists by name: 1 cmyk, 1 exif-rotated, 1 grayscale, 1 png" in ended.stderr
    (out / "train-000002.tar").unlink()
    with pytest.raises(ShardError, match=r"train-000002.tar is in the manifest but missing"):
        Shards(out)
    ended = run("verify")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "train-000002.tar: missing" in ended.stderr and "dvc repro --force shard" in ended.stderr
    assert run("shard").returncode == 0
    verify.verify_all(out)
