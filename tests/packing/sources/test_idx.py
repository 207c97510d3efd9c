"""IDX files: the same shards as from a folder of the same images, and damaged or mixed-up files are named."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.base import config
from pipeline.base.errors import SourceError
from pipeline.loading.datasets import IndexedImages
from pipeline.packing import pack
from pipeline.packing.sources import detect, idx
from pipeline.packing.sources.digits import open_source
from pipeline.packing.sources.idx import FASHION_CLASSES, IdxFiles
from pipeline.shards.manifests import Shards
from tests.packing import layouts
from tests.packing.conftest import contents, write_shards

SUFFIXES = ("", ".gz")

LABELS = {"train": np.array([2, 0, 1, 0, 2, 1], np.uint8), "val": np.array([1, 0, 2], np.uint8)}


def make_images(height: int = 5, width: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        split: generator.integers(0, 256, (len(labels), height, width), np.uint8) for split, labels in LABELS.items()
    }


@pytest.fixture(params=SUFFIXES, ids=["plain", "gz"])
def folder(request, tmp_path) -> Path:
    return layouts.idx_files(make_images(), LABELS, tmp_path / "idx", request.param)


def listing(folder: Path, class_names: tuple[str, ...] | None = None, labels: str = "own"):
    found = detect.detect_source(str(folder), class_names)
    assert isinstance(found, IdxFiles)
    return found.list_images(labels)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**16), st.sampled_from(SUFFIXES))
def test_shards_are_those_of_a_folder_of_the_same_images(tmp_path, height, width, seed, suffix):
    shutil.rmtree(tmp_path)
    images = make_images(height, width, seed)
    for split, labels in LABELS.items():
        for number, (image, label) in enumerate(zip(images[split], labels, strict=True)):
            path = tmp_path / "tree" / split / str(label) / f"{number:05d}.pgm"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    source = layouts.idx_files(images, LABELS, tmp_path / "idx", suffix)
    expected = write_shards(tmp_path / "tree", tmp_path / "a")
    manifest = write_shards(source, tmp_path / "b")
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    assert (manifest.counts, manifest.classes) == ({"train": 6, "val": 3}, expected.classes)
    assert (manifest.layout, expected.layout) == ("IDX files", "a folder tree")


def test_pixels_and_labels_are_those_of_the_file(tmp_path):
    images = {split: np.zeros((len(labels), 28, 28), np.uint8) for split, labels in LABELS.items()}
    for number, image in enumerate(images["val"]):
        image[:, 14:] = 80 * number + 40  # a JPEG keeps constant blocks as they are
    write_shards(layouts.idx_files(images, LABELS, tmp_path / "idx"), tmp_path / "out")
    found = IndexedImages(Shards(tmp_path / "out"), "val")
    rows = range(len(found))
    assert found.keys(rows) == ["val/0/00001", "val/1/00000", "val/2/00002"]
    assert found.labels.tolist() == [0, 1, 2]
    for row, number in zip(rows, (1, 0, 2), strict=True):
        pixels = found.decode(row, found.read_jpegs([row])[0]).numpy()
        assert pixels.shape == (3, 28, 28)
        assert np.abs(pixels.astype(int) - images["val"][number]).max() <= 2


def test_fashion_mnist_is_known_by_its_validation_labels(tmp_path, monkeypatch):
    labels = {"train": np.arange(10, dtype=np.uint8), "val": np.arange(10, dtype=np.uint8)[::-1].copy()}
    images = {split: np.zeros((10, 2, 2), np.uint8) for split in labels}
    folder = layouts.idx_files(images, labels, tmp_path / "idx")
    assert listing(folder).classes == [str(label) for label in range(10)]
    monkeypatch.setattr(idx, "_hash_labels", lambda labels_N: "3d0e6c6ea990b53b")
    assert listing(folder).classes == list(FASHION_CLASSES)
    assert FASHION_CLASSES[9] == "Ankle boot"
    assert listing(folder, class_names=tuple("abcdefghij")).classes == list("abcdefghij")


def test_labels_that_leave_numbers_out_become_0_to_n(tmp_path):
    labels = {"train": np.array([3, 12, 7], np.uint8), "val": np.array([12, 3], np.uint8)}
    images = {split: np.zeros((len(values), 2, 2), np.uint8) for split, values in labels.items()}
    found = listing(layouts.idx_files(images, labels, tmp_path / "idx"))
    assert found.classes == ["3", "7", "12"]
    assert found.splits["val"]["name"].to_pylist() == ["val/03/00001.pgm", "val/12/00000.pgm"]
    assert found.splits["val"]["label"].to_pylist() == [0, 2]


def test_names_of_another_number_or_source_are_rejected(folder, tmp_path):
    with pytest.raises(SourceError, match="data.class_names has 2 names, and .* has 3 different labels, 0 to 2"):
        listing(folder, class_names=("a", "b"))
    with pytest.raises(SourceError, match="data.labels is imagenet, and IDX files have labels of their own"):
        listing(folder, labels="imagenet")
    tree = layouts.folder_tree(layouts.images(), tmp_path / "tree")
    with pytest.raises(SourceError, match=f"data.class_names is for IDX files, and {tree}, a folder tree, names its"):
        detect.detect_source(str(tree), ("a", "b", "c"))


def test_a_class_without_training_images_is_named(tmp_path):
    labels = {"train": np.array([0, 1], np.uint8), "val": np.array([0, 5], np.uint8)}
    images = {split: np.zeros((2, 2, 2), np.uint8) for split in labels}
    with pytest.raises(SourceError, match="no training images of 5|5: not among the classes that are labels in"):
        listing(layouts.idx_files(images, labels, tmp_path / "idx"))


def test_plain_files_are_preferred_and_dots_are_accepted(tmp_path):
    folder = layouts.idx_files(make_images(), LABELS, tmp_path / "idx")
    other = layouts.idx_files(make_images(seed=1), LABELS, tmp_path / "other", ".gz")
    for path in other.iterdir():
        shutil.copy(path, folder)
    assert all(not name.endswith(".gz") for name, _ in IdxFiles(folder).list_files())
    (folder / "train-images-idx3-ubyte").rename(folder / "train-images.idx3-ubyte")
    assert IdxFiles(folder).list_files()[0][0] == "train-images.idx3-ubyte"


def test_a_missing_file_is_named(folder, tmp_path):
    suffix = next(folder.iterdir()).suffix
    (folder / f"t10k-labels-idx1-ubyte{suffix}").unlink()
    with pytest.raises(SourceError, match="t10k-labels-idx1-ubyte not found, neither plain nor as .gz"):
        detect.detect_source(str(folder))
    with pytest.raises(SourceError, match=f"one of four IDX files: set data.source to its folder, {folder}"):
        detect.detect_source(str(folder / f"t10k-images-idx3-ubyte{suffix}"))


def test_a_truncated_file_is_named(tmp_path):
    folder = layouts.idx_files(make_images(), LABELS, tmp_path / "plain")
    path = folder / "train-images-idx3-ubyte"
    content = path.read_bytes()
    for damaged, message in {
        content[:-1]: f"{path} has 105 bytes instead of 106, by its own header: copy or download it again",
        content + b"x": f"{path} has 107 bytes instead of 106",
        content[:9]: f"{path} ends within its header, after 9 bytes",
        b"": f"{path} is not an IDX file of images: it starts with nothing",
        b"<html>404</html>": f"{path} is not an IDX file of images: it starts with 3c 68 74 6d instead of 00 00 08 03",
    }.items():
        path.write_bytes(damaged)
        with pytest.raises(SourceError, match=message):
            listing(folder)


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"no gzip", lambda content: b""])
def test_a_truncated_gz_is_named(tmp_path, damage):
    folder = layouts.idx_files(make_images(), LABELS, tmp_path / "gz", ".gz")
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SourceError, match=f"{path} (is truncated or damaged|cannot be read|is not an IDX file)"):
        listing(folder)


def test_swapped_files_are_named(tmp_path):
    folder = layouts.idx_files(make_images(), LABELS, tmp_path / "kinds")
    images, labels = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"
    content = images.read_bytes()
    images.write_bytes(labels.read_bytes())
    with pytest.raises(SourceError, match=f"{images} is not .* of images: .*, as a file of labels does: rename it"):
        listing(folder)
    images.write_bytes(content)
    shutil.copy(folder / "t10k-labels-idx1-ubyte", labels)
    with pytest.raises(SourceError, match=f"{images} has 6 images and {labels} has 3 labels: one of them belongs to"):
        listing(folder)


def test_a_file_that_changes_after_listing_is_named(folder, tmp_path):
    source = IdxFiles(folder)
    found = source.list_images("own")
    path = next(path for path in folder.iterdir() if path.name.startswith("train-images"))
    content = layouts.idx_content(np.zeros((6, 9, 9), np.uint8))
    path.write_bytes(gzip.compress(content) if path.suffix else content)
    with pytest.raises(SourceError, match=f"{path} has changed since it was listed"):
        pack.pack_listing(found, folder, tmp_path / "out", source=str(folder), images_per_shard=4, seed=0)


def test_a_missing_source_is_reported_with_its_hint(tmp_path):
    preset = config.load_experiment(Path(__file__).parents[3] / "presets/fashion.yaml").data
    assert preset.source == "/usr/share/datasets/fashion-mnist"
    missing = preset.model_copy(update={"source": str(tmp_path / "nowhere")})
    with pytest.raises(
        SourceError, match="nowhere not found. .*apt-get install dataset-fashion-mnist.*zalandoresearch"
    ):
        open_source(missing)
