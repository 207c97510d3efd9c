"""Existing shards are indexed in place and in their order, and invalid samples are named."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
import webdataset

from pipeline.base import imagenet, progress
from pipeline.base.errors import ShardError
from pipeline.loading.datasets import IndexedImages
from pipeline.packing import pack, tar_scan
from pipeline.packing.indexing import index_shards
from pipeline.packing.tar_scan import scan_tar
from pipeline.shards import manifests, verify
from pipeline.shards.locations import open_store
from pipeline.shards.manifests import Shards
from pipeline.shards.store import Store
from tests.packing import layouts

FIRST = "imagenet1k-train-0000.tar"

_LEFT_OPEN = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # by webdataset

TRUE = {wnid: imagenet.wnids().index(wnid) for wnid in layouts.WNIDS}


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Shards like timm's: 15 training and 6 validation images of three classes."""
    return layouts.shards(layouts.images(), tmp_path / "tars")


@pytest.fixture
def index(tars: Path, tmp_path: Path) -> Callable[..., manifests.Manifest]:
    """Indexes the shards with the given labels."""
    return lambda labels="own": index_shards(str(tars), tmp_path / "out", labels=labels)


def write_tar(path: Path, **files: bytes) -> None:
    """A tar of those files; `__` in a name stands for the dot before the extension."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            layouts.add_file(tar, name.replace("__", "."), content)


def two_splits(folder: Path, train: dict[str, bytes], val: dict[str, bytes] | None = None) -> Path:
    """One tar of each split, with the same files in both unless others are given for the second."""
    write_tar(folder / "train-0.tar", **train)
    write_tar(folder / "val-0.tar", **(val or train))
    return folder


def labels_of(folder: Path, split: str = "train") -> dict[str, int]:
    table = pq.read_table(folder / f"{split}.index.parquet")
    return dict(zip(table["key"].to_pylist(), table["label"].to_pylist(), strict=True))


def streamed(folder: Path, pattern: str) -> list[dict]:
    """All samples as webdataset reads them."""
    paths = [str(path) for path in sorted(folder.glob(pattern))]
    return list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))


@_LEFT_OPEN
def test_images_are_those_that_webdataset_reads(tars, index, tmp_path):
    manifest = index()
    assert manifest.counts == {"train": 15, "val": 6} and manifest.location == str(tars)
    assert manifest.classes == sorted(layouts.WNIDS)
    shards = Shards(tmp_path / "out")
    for split, pattern in (("train", "*train*"), ("val", "*validation*")):
        images, samples = IndexedImages(shards, split), streamed(tars, pattern)
        rows = range(len(images))
        assert images.keys(rows) == [sample["__key__"] for sample in samples]
        assert images.read_jpegs(rows) == [sample["jpg"] for sample in samples]
        assert images.labels.tolist() == [int(sample["cls"]) for sample in samples]
        assert images[0][0].dim() == 3
    verify.verify_all(tmp_path / "out")


@_LEFT_OPEN
@pytest.mark.parametrize("suffix", ["jpeg", "JPEG", "png"])
def test_other_image_suffixes_are_accepted(tmp_path, suffix):
    tars = layouts.shards(layouts.images(), tmp_path / "tars", suffix=suffix)
    index_shards(str(tars), tmp_path / "out", labels="own")
    images = IndexedImages(tmp_path / "out", "train")
    assert images.read_jpegs(range(len(images))) == [sample[suffix.lower()] for sample in streamed(tars, "*train*")]
    assert images[3][0].dim() == 3


def test_shards_at_a_url_have_the_index_of_the_folder(tars, index, tmp_path):
    local = index()
    files, url = fsspec.filesystem("memory"), f"memory://{tmp_path.name}/tars"
    files.put(str(tars), f"{tmp_path.name}/tars", recursive=True)
    remote = index_shards(url, tmp_path / "remote", labels="own")
    assert remote == replace(local, source=url, location=url)
    images, there = IndexedImages(tmp_path / "out", "train"), IndexedImages(tmp_path / "remote", "train")
    assert there.read_jpegs(range(len(there))) == images.read_jpegs(range(len(images)))


@pytest.mark.slow
def test_ray_tasks_find_what_one_process_finds(tars, index, tmp_path):
    assert index_shards(str(tars), tmp_path / "tasks", labels="own", in_process=False) == index()
    (tars / FIRST).write_bytes((tars / FIRST).read_bytes()[:700])
    with pytest.raises(ShardError, match=FIRST) as error:
        index_shards(str(tars), tmp_path / "tasks", labels="own", in_process=False)
    assert type(error.value) is ShardError


def test_an_interrupted_indexing_resumes(tars, index, tmp_path, monkeypatch):
    expected = index()
    (tmp_path / "out" / "manifest.json").unlink()
    scanned: list[str] = []

    def counting(store: Store, name: str) -> tar_scan.TarScan:
        if len(scanned) == 4:
            raise KeyboardInterrupt
        scanned.append(name)
        return scan_tar(store, name)

    monkeypatch.setattr("pipeline.packing.indexing.scan_tar", counting)
    with pytest.raises(KeyboardInterrupt):
        index()
    path = tars / scanned[1]
    path.write_bytes(path.read_bytes())
    again, scanned[:] = scanned[1], []
    assert index() == expected
    assert len(scanned) == 3 and again in scanned
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "manifest.json",
        "train.index.parquet",
        "val.index.parquet",
    }


def test_progress_logs_rate_and_time_left(tars, index, caplog, monkeypatch):
    monkeypatch.setattr(progress, "_LOG_INTERVAL_S", 0)
    caplog.set_level("INFO")
    index()
    messages = [record.getMessage() for record in caplog.records if record.getMessage().startswith("indexing: ")]
    assert len(messages) == 6
    assert re.fullmatch(r"indexing: 0 of 0 MB, 21 images, \d+ MB/s, 0 min left", messages[-1])


def test_imagenet_labels_are_imagenets_indices(index, tmp_path):
    manifest = index("imagenet")
    assert manifest.classes == list(imagenet.wnids())
    found = labels_of(tmp_path / "out")
    assert {found[key] for key in found if key.startswith("n03417042")} == {TRUE["n03417042"]}
    assert set(found.values()) == set(labels_of(tmp_path / "out", "val").values()) == set(TRUE.values())


@pytest.mark.parametrize("numbers", [TRUE, {"n02102040": 7, "n01440764": 3, "n03417042": 11}])
def test_a_subset_is_numbered_anew_in_the_order_of_its_wnids(tmp_path, numbers):
    tars = layouts.shards(layouts.images(), tmp_path / "tars", labels=numbers)
    manifest = index_shards(str(tars), tmp_path / "out", labels="own")
    assert manifest.classes == sorted(layouts.WNIDS)
    assert all(manifest.classes[label] == key[:9] for key, label in labels_of(tmp_path / "out").items())
    index_shards(str(tars), tmp_path / "out", labels="imagenet")
    assert set(labels_of(tmp_path / "out").values()) == set(TRUE.values())


def test_numbers_without_gaps_are_kept(tmp_path):
    numbers = {"n02102040": 0, "n01440764": 1, "n03417042": 2}
    tars = layouts.shards(layouts.images(), tmp_path / "tars", labels=numbers)
    assert index_shards(str(tars), tmp_path / "out", labels="own").classes == list(numbers)


def test_class_names_are_found_in_all_known_files(tmp_path):
    jpeg = layouts.jpeg(0)

    def classes(**files: bytes) -> list[str]:
        tars = two_splits(tmp_path / "tars", files)
        return index_shards(str(tars), tmp_path / "out", labels="own").classes

    assert classes(a__jpg=jpeg, a__cls=b"1", b__jpg=jpeg, b__cls=b"0\n") == ["0", "1"]
    assert classes(a__jpg=jpeg, a__cls=b"dog", b__jpg=jpeg, b__cls=b"cat") == ["cat", "dog"]
    assert labels_of(tmp_path / "out") == {"a": 1, "b": 0}
    notes = b'{"label": 0, "class_name": "zebra"}', b'{"label": 1, "class_name": "ape"}'
    assert classes(a__jpg=jpeg, a__json=notes[0], b__jpg=jpeg, b__json=notes[1]) == ["zebra", "ape"]
    assert classes(n01440764_1__jpg=jpeg, n02102040_1__jpg=jpeg) == ["n01440764", "n02102040"]
    for name, text in (
        ("classes.txt", "cat\ndog\nfox\n"),
        ("classes.json", '["cat", "dog", "fox"]'),
        ("classes", '{"0": "cat", "1": "dog", "2": "fox"}'),
    ):
        (tmp_path / "tars" / name).write_text(text)
        assert classes(a__jpg=jpeg, a__cls=b"2", b__jpg=jpeg, b__cls=b"0") == ["cat", "dog", "fox"]
        assert labels_of(tmp_path / "out") == {"a": 2, "b": 0}
        (tmp_path / "tars" / name).unlink()


def assert_refused(
    tmp_path: Path, message: str, train: dict[str, bytes], val: dict[str, bytes] | None = None, labels: str = "own"
) -> None:
    with pytest.raises(ShardError, match=message):
        index_shards(str(two_splits(tmp_path / "tars", train, val)), tmp_path / "out", labels=labels)
    assert not (tmp_path / "out" / "manifest.json").exists()


JPEG = layouts.jpeg(0)


@pytest.mark.parametrize(
    ("message", "files"),
    [
        ("train-0.tar: a has no images, among the files .cls", {"a__cls": b"0"}),
        (
            "train-0.tar: a has 2 images, among the files .cls, .jpg, .png",
            {"a__jpg": JPEG, "a__png": JPEG, "a__cls": b"0"},
        ),
        ("train-0.tar: a has no class: a .cls", {"a__jpg": JPEG}),
        (
            "train-0.tar: a has the label 1 in its .cls and 2 in its .json",
            {"a__jpg": JPEG, "a__cls": b"1", "a__json": b'{"label": 2}'},
        ),
        ("train-0.tar: a has a .cls or .json that cannot be read", {"a__jpg": JPEG, "a__json": b"{"}),
        (
            "train-0.tar: b has the class ape and the number 0, which belongs to cat elsewhere",
            {
                "a__jpg": JPEG,
                "a__json": b'{"label": 0, "class": "cat"}',
                "b__jpg": JPEG,
                "b__json": b'{"label": 0, "class": "ape"}',
            },
        ),
        (
            "train-0.tar: b has the class cat and the number 1, but 0 elsewhere",
            {
                "a__jpg": JPEG,
                "a__json": b'{"label": 0, "class": "cat"}',
                "b__jpg": JPEG,
                "b__json": b'{"label": 1, "class": "cat"}',
            },
        ),
        (
            "numbers 0 to 5, but no image has 1: set data.labels to imagenet",
            {"a__jpg": JPEG, "a__cls": b"5", "b__jpg": JPEG, "b__cls": b"0"},
        ),
        (
            "train-0.tar: a has class number 0 without a name",
            {"a__jpg": JPEG, "a__cls": b"0", "b__jpg": JPEG, "b__cls": b"cat"},
        ),
        (
            "train-0.tar: key a is repeated in train-0.tar",
            {"a__jpg": JPEG, "a__cls": b"0", "b__jpg": JPEG, "b__cls": b"0", "a__JPEG": JPEG, "a__CLS": b"0"},
        ),
    ],
)
def test_samples_that_do_not_fit_are_named_with_their_shard(tmp_path, message, files):
    assert_refused(tmp_path, message, files)


def test_classes_that_do_not_fit_are_named_with_their_shard(tmp_path):
    cat, dog = {"a__jpg": JPEG, "a__cls": b"cat"}, {"b__jpg": JPEG, "b__cls": b"dog"}
    assert_refused(tmp_path, "val-0.tar: b: no training image has its class, dog", cat, cat | dog)
    assert_refused(tmp_path, "train-0.tar: a: class cat is not one of ImageNet's 1,000", cat, labels="imagenet")
    assert_refused(
        tmp_path,
        "train-0.tar: a: class number 1000 is not one of ImageNet's",
        {"a__jpg": JPEG, "a__cls": b"1000"},
        labels="imagenet",
    )


def test_imagenet_in_another_order_is_refused(tmp_path):
    files = {
        f"{wnid}_1__{kind}": content
        for number, wnid in enumerate(reversed(imagenet.wnids()))
        for kind, content in (("jpg", b"image"), ("cls", str(number).encode()))
    }
    assert_refused(tmp_path, "their numbers are not ImageNet's usual ones: set data.labels to imagenet", files)
    manifest = index_shards(str(tmp_path / "tars"), tmp_path / "out", labels="imagenet")
    assert all(manifest.classes[label] == key[:9] for key, label in labels_of(tmp_path / "out").items())


def test_a_missing_shard_is_named(tars, index):
    (tars / "imagenet1k-train-0002.tar").unlink()
    with pytest.raises(ShardError, match="shard number 2 is missing beside imagenet1k-train-0001.tar"):
        index()
    (tars / "imagenet1k-train-0003.tar").unlink()
    index()
    info = {"splits": {"train": {"filenames": [FIRST, "imagenet1k-train-0002.tar"], "shard_lengths": [4, 4]}}}
    (tars / "_info.json").write_text(json.dumps(info))
    with pytest.raises(ShardError, match="imagenet1k-train-0002.tar is missing: _info.json lists it"):
        index()
    info["splits"]["train"] = {"filenames": [FIRST], "shard_lengths": [5]}
    (tars / "_info.json").write_text(json.dumps(info))
    with pytest.raises(ShardError, match=f"{FIRST} has 4 images, but _info.json lists 5"):
        index()
    for path in tars.glob("*train*"):
        path.unlink()
    with pytest.raises(ShardError, match=r"no tars of the split train: expected \*train\*.tar, found 2 others"):
        index()


def test_a_missing_folder_is_reported(tmp_path):
    with pytest.raises(ShardError, match="nowhere cannot be listed: No such file"):
        index_shards(str(tmp_path / "nowhere"), tmp_path / "out", labels="own")
    with pytest.raises(ShardError, match="is the output folder of the indices"):
        index_shards(str(tmp_path), tmp_path, labels="own")


def test_a_shard_cut_anywhere_is_refused(tars):
    content = (tars / FIRST).read_bytes()
    end = -(-len(content.rstrip(b"\0")) // 512) * 512  # then come the zeros that end the tar
    store = open_store(tars, {FIRST: {"size": len(content)}})
    whole = scan_tar(store, FIRST)
    for cut in sorted({*range(0, end + 1024, 512), *range(100, end, 700), end + 1023}):
        (tars / FIRST).write_bytes(content[:cut])
        with pytest.raises(ShardError, match=f"{FIRST} is truncated or altered near byte {cut}"):
            scan_tar(open_store(tars, {FIRST: {"size": cut}}), FIRST)
    (tars / FIRST).write_bytes(content[: end + 1024])
    assert scan_tar(open_store(tars, {}), FIRST).samples == whole.samples


def test_an_altered_header_is_refused(tars):
    content = bytearray((tars / FIRST).read_bytes())
    offset = scan_tar(open_store(tars, {}), FIRST).samples["offset"][2].as_py() - 512
    content[offset] ^= 1
    (tars / FIRST).write_bytes(content)
    with pytest.raises(ShardError, match=f"{FIRST} is truncated or altered near byte"):
        scan_tar(open_store(tars, {}), FIRST)
    (tars / FIRST).write_bytes(bytes(content[:offset]) + bytes(1024) + bytes(content[offset:]))
    with pytest.raises(ShardError, match=f"{FIRST} is truncated or altered"):
        scan_tar(open_store(tars, {}), FIRST)


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


@pytest.fixture
def flopeq_shards(tmp_path: Path) -> Path:
    """Shards that flopeq wrote."""
    source = layouts.folder_tree(layouts.images(), tmp_path / "source")
    pack.pack_source(str(source), tmp_path / "own", images_per_shard=4, seed=0, in_process=True)
    return tmp_path / "own"


@pytest.mark.parametrize("at", ["folder", "memory"])
def test_flopeq_shards_elsewhere_keep_their_indices(flopeq_shards, tmp_path, at):
    place = str(flopeq_shards)
    if at == "memory":
        place = f"memory://{tmp_path.name}/own"
        fsspec.filesystem("memory").put(str(flopeq_shards), f"{tmp_path.name}/own", recursive=True)
    manifest = index_shards(place, tmp_path / "out", labels="own")
    before = Shards(flopeq_shards)
    assert asdict(manifest) == before.manifest | {"location": place, "source": place}
    assert Shards(tmp_path / "out").fingerprint == before.fingerprint
    images, there = IndexedImages(flopeq_shards, "train"), IndexedImages(tmp_path / "out", "train")
    assert there.read_jpegs(range(len(there))) == images.read_jpegs(range(len(images)))
    verify.verify_all(tmp_path / "out")
    again = index_shards(str(tmp_path / "out"), tmp_path / "again", labels="own")
    assert again.location == place
    with pytest.raises(ShardError, match="have the labels 'own': set data.labels to 'own'"):
        index_shards(place, tmp_path / "out", labels="imagenet")


def test_damaged_flopeq_shards_elsewhere_are_named(flopeq_shards, tmp_path):
    path = flopeq_shards / "val.index.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?")
    with pytest.raises(ShardError, match="val.index.parquet does not match its manifest"):
        index_shards(str(flopeq_shards), tmp_path / "out", labels="own")
    path.write_bytes(content)
    (flopeq_shards / "train-000001.tar").unlink()
    with pytest.raises(ShardError, match="train-000001.tar is in the manifest but missing"):
        index_shards(str(flopeq_shards), tmp_path / "out", labels="own")
    (flopeq_shards / "manifest.json").write_text('{"classes": []}')
    with pytest.raises(ShardError, match="manifest.json is not a manifest of this version of flopeq"):
        index_shards(str(flopeq_shards), tmp_path / "out", labels="own")
    with pytest.raises(ShardError, match="is from another version of flopeq: run `dvc repro --force shard`"):
        manifests.read_manifest(flopeq_shards)


def test_a_shard_that_changed_after_indexing_is_found(tars, index, tmp_path):
    index()
    verify.mark_verified(tmp_path / "out")
    files = sorted(tars.glob("*train*"))
    content = files[0].read_bytes()
    files[0].write_bytes(files[1].read_bytes())
    files[1].write_bytes(content)
    with pytest.raises(ShardError, match=f"{FIRST}: its contents differ(.|\n)*restore the files at {tars}"):
        verify.verify_changed(tmp_path / "out")
    with pytest.raises(ShardError, match=FIRST):
        IndexedImages(tmp_path / "out", "train")[0]
