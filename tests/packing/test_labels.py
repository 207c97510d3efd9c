"""Labels of existing shards: where they come from, and which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.base import imagenet
from pipeline.base.errors import ShardError
from pipeline.packing.indexing import index_shards
from tests.packing import layouts
from tests.packing.conftest import IMAGENET_LABELS, JPEG, labels_of, two_splits


def test_imagenet_labels_are_imagenets_indices(index, tmp_path):
    manifest = index("imagenet")
    assert manifest.classes == list(imagenet.wnids())
    labels = labels_of(tmp_path / "out")
    assert {labels[key] for key in labels if key.startswith("n03417042")} == {IMAGENET_LABELS["n03417042"]}
    assert set(labels.values()) == set(labels_of(tmp_path / "out", "val").values()) == set(IMAGENET_LABELS.values())


@pytest.mark.parametrize("numbers", [IMAGENET_LABELS, {"n02102040": 7, "n01440764": 3, "n03417042": 11}])
def test_a_subset_is_numbered_anew_in_the_order_of_its_wnids(tmp_path, numbers):
    tars = layouts.shards(layouts.images(), tmp_path / "tars", labels=numbers)
    manifest = index_shards(str(tars), tmp_path / "out", labels="own")
    assert manifest.classes == sorted(layouts.WNIDS)
    assert all(manifest.classes[label] == key[:9] for key, label in labels_of(tmp_path / "out").items())
    index_shards(str(tars), tmp_path / "out", labels="imagenet")
    assert set(labels_of(tmp_path / "out").values()) == set(IMAGENET_LABELS.values())


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
