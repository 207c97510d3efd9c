"""Tiny ImageNets: one set of small images, written out in every layout that a source may have.

    images = layouts.images(issues=layouts.ISSUES)
    for name, build in layouts.LAYOUTS.items():
        source = build(images, tmp_path / name)   # what data.source would name

A set of images is a dictionary of contents by canonical name, `<split>/<class>/<file>`, as the listings of
pipeline.packing.sources give them.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

Images = Mapping[str, bytes]

WNIDS = ("n02102040", "n01440764", "n03417042")
"""Three classes of ImageNet's, labels 217, 0 and 569; the first has the images with issues."""

INNER = ("n00001740", "n02084071")
"""Synsets of the devkit's table that have children, so they are not classes."""

ISSUES = ("grayscale", "cmyk", "rotated", "png")
"""Issues of valid images."""

BAD_IMAGES = ("empty", "truncated", "text")
"""Kinds of files with the name of an image that are not valid images."""

TRAIN_TAR, VAL_TAR, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"

TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"

CLS_LOC = "ILSVRC/Data/CLS-LOC"


def images(
    *, train: int = 5, val: int = 2, wnids: Iterable[str] = WNIDS, issues: Iterable[str] = ()
) -> dict[str, bytes]:
    """`train` and `val` images of each class, and one training image with each of the issues.

    Names are ImageNet's: training images of a class are numbered with gaps, those of validation over all classes.
    """
    wnids = list(wnids)
    contents = {}
    for class_number, wnid in enumerate(wnids):
        for number in range(train):
            contents[f"train/{wnid}/{wnid}_{7 * number + 3}.JPEG"] = jpeg(1000 * class_number + number)
    for number in range(1, val * len(wnids) + 1):
        contents[f"val/{wnids[number % len(wnids)]}/ILSVRC2012_val_{number:08d}.JPEG"] = jpeg(100_000 + number)
    return contents | {issue_name(kind, wnids[0]): issue_image(kind) for kind in issues}


def issue_name(kind: str, wnid: str = WNIDS[0]) -> str:
    """Name of the image with that issue."""
    return f"train/{wnid}/{wnid}_{kind}.JPEG"


def pixels(seed: int) -> Image.Image:
    """A smooth RGB image, whose size differs with the seed."""
    generator = np.random.default_rng(seed)
    width, height = (int(side) for side in generator.integers(24, 48, 2))
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def jpeg(seed: int) -> bytes:
    """An RGB JPEG of about 1 KB."""
    return _encoded(pixels(seed), "JPEG", quality=85)


def issue_image(kind: str) -> bytes:
    """Content of the image with that issue, or of the bad image of that kind."""
    image, content = pixels(7), jpeg(7)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be rotated by 90 degrees
    return {
        "grayscale": lambda: _encoded(image.convert("L"), "JPEG"),
        "cmyk": lambda: _encoded(image.convert("CMYK"), "JPEG"),
        "rotated": lambda: _encoded(image, "JPEG", exif=exif),
        "png": lambda: _encoded(image, "PNG"),
        "empty": lambda: b"",
        "truncated": lambda: content[: len(content) * 2 // 3],
        "text": lambda: b"404: no such image\n" * 20,
    }[kind]()


def archives(images: Images, folder: Path) -> Path:
    """The official archives: class tars inside a tar, a flat tar of validation images, the devkit."""
    folder.mkdir(parents=True)
    wnids = sorted({_class_of(name) for name in images})
    with tarfile.open(folder / TRAIN_TAR, "w") as outer:
        for wnid in wnids:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for name in _names_under(images, f"train/{wnid}/"):
                    add_file(tar, _file(name), images[name])
            add_file(outer, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(folder / VAL_TAR, "w") as tar:
        for name in sorted(_names_under(images, "val/"), key=_file):
            add_file(tar, _file(name), images[name])
    id_of = {wnid: number for number, wnid in enumerate(reversed(wnids), 1)}
    truth = "".join(f"{id_of[_class_of(name)]}\n" for name in sorted(_names_under(images, "val/"), key=_file))
    devkit(folder / DEVKIT, {"data/meta.mat": meta_mat(id_of), TRUTH: truth.encode()})
    return folder


def devkit(path: Path, files: Mapping[str, bytes]) -> None:
    """A devkit of those files."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            add_file(tar, f"ILSVRC2012_devkit_t12/{name}", content)


def meta_mat(id_of: Mapping[str, int]) -> bytes:
    """The devkit's table of synsets, with inner ones after the classes, as in the original."""
    rows = [(number, wnid, "words", "gloss", 0, np.array([]), 0, 1300) for wnid, number in id_of.items()]
    rows += [
        (len(id_of) + place, wnid, "words", "gloss", 2, np.array([1, 2]), 3, 0) for place, wnid in enumerate(INNER, 1)
    ]
    fields = (
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    )
    table = np.empty((len(rows), 1), dtype=[(field, object) for field in fields])
    table[:, 0] = rows
    file = io.BytesIO()
    scipy.io.savemat(file, {"synsets": table}, do_compression=True)
    return file.getvalue()


def kaggle_folder(images: Images, folder: Path) -> Path:
    """Kaggle's files, extracted."""
    for name, content in kaggle_files(images).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def kaggle_zip(images: Images, folder: Path) -> Path:
    """A folder with Kaggle's zip, in which every second file is deflated."""
    folder.mkdir(parents=True)
    path = folder / "imagenet-object-localization-challenge.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, (name, content) in enumerate(kaggle_files(images).items()):
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED)
    return folder


def kaggle_files(images: Images) -> dict[str, bytes]:
    """The files of Kaggle's layout, test images and annotations among them."""
    solution, mapping = io.StringIO(), io.StringIO()
    table = csv.writer(solution, lineterminator="\n")
    table.writerow(["ImageId", "PredictionString"])
    for name in sorted(_names_under(images, "val/"), reverse=True):
        table.writerow([Path(name).stem, f"{_class_of(name)} 1 2 30 40 {_class_of(name)} 5 6 7 8 "])
    for wnid in sorted({_class_of(name) for name in images}):
        mapping.write(f"{wnid} some words, other words\n")
    files = {
        "LOC_synset_mapping.txt": mapping.getvalue().encode(),
        "LOC_val_solution.csv": solution.getvalue().encode(),
        "LOC_sample_submission.csv": b"ImageId,PredictionString\n",
        f"{CLS_LOC}/test/ILSVRC2012_test_00000001.JPEG": jpeg(1),
        "ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml": b"<annotation/>",
    }
    for name, content in images.items():
        path = name if name.startswith("train/") else f"val/{_file(name)}"
        files[f"{CLS_LOC}/{path}"] = content
    return files


def folder_tree(images: Images, folder: Path) -> Path:
    """A folder for each split, and in it one for each class."""
    for name, content in images.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def shards(
    images: Images,
    folder: Path,
    *,
    images_per_shard: int = 4,
    labels: Mapping[str, int] | None = None,
    suffix: str = "jpg",
) -> Path:
    """WebDataset shards as timm's of ImageNet are: `<key>.cls`, `.jpg` and `.json`, in no order of names.

    `labels` are by class; without them they count in the order of the classes' names.
    """
    folder.mkdir(parents=True)
    labels = labels or {wnid: place for place, wnid in enumerate(sorted({_class_of(name) for name in images}))}
    for split, named in (("train", "train"), ("val", "validation")):
        names = sorted(_names_under(images, f"{split}/"), key=lambda name: _file(name)[::-1])
        for number, start in enumerate(range(0, len(names), images_per_shard)):
            with tarfile.open(folder / f"imagenet1k-{named}-{number:04d}.tar", "w") as tar:
                for name in names[start : start + images_per_shard]:
                    key, label = Path(name).stem, labels[_class_of(name)]
                    notes = {"filename": name.partition("/")[2], "label": label}
                    add_file(tar, f"{key}.cls", str(label).encode())
                    add_file(tar, f"{key}.{suffix}", images[name])
                    add_file(tar, f"{key}.json", json.dumps(notes).encode())
    return folder


def idx_files(
    images: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray], folder: Path, suffix: str = ""
) -> Path:
    """The four IDX files: `images` (num, height, width) and `labels` (num,) of `train` and `val`, uint8.

    With the suffix `.gz`, they are compressed.
    """
    folder.mkdir(parents=True)
    for split, prefix in (("train", "train"), ("val", "t10k")):
        for kind, values in (("images-idx3", images[split]), ("labels-idx1", labels[split])):
            content = idx_content(values)
            path = folder / f"{prefix}-{kind}-ubyte{suffix}"
            path.write_bytes(gzip.compress(content) if suffix == ".gz" else content)
    return folder


def idx_content(values: np.ndarray) -> bytes:
    """An IDX file: two zeros, 8 for bytes, the number of axes, the size of each axis, the values."""
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


LAYOUTS: dict[str, Callable[[Images, Path], Path]] = {
    "the official archives": archives,
    "Kaggle's folder": kaggle_folder,
    "Kaggle's zip": kaggle_zip,
    "a folder tree": folder_tree,
}
"""Builders of the layouts that shards are written from, by the name that their listing has."""


def add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Appends a file to a tar that is being written."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    header.mtime = 1_340_000_000
    tar.addfile(header, io.BytesIO(content))


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _names_under(images: Images, prefix: str) -> list[str]:
    return [name for name in images if name.startswith(prefix)]


def _class_of(name: str) -> str:
    return name.split("/")[1]


def _file(name: str) -> str:
    return name.rpartition("/")[2]
