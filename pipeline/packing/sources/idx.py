"""The IDX files of the MNIST family: `{train,t10k}-{images-idx3,labels-idx1}-ubyte`, plain or compressed with gzip.

The format is described at the end of LeCun, Cortes and Burges' page on MNIST: a magic number (two zeros, the type of
the values, the number of axes), the size of each axis as a big-endian 32-bit number, and the values in C order. An
image of such a file has one byte per pixel and no header of its own. It is read as a PGM, which is those bytes after
a line of text, so that everything after the reader treats it as any other image.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from pipeline.base.errors import SourceError
from pipeline.packing.sources.listing import GREY_PIXELS, Listing, ListingBuilder

FILE_PREFIXES = {"train": "train", "val": "t10k"}

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
"""Classes of Fashion-MNIST, by label (Xiao, Rasul and Vollgraf 2017, table 2)."""

_KNOWN_CLASSES = {"3d0e6c6ea990b53b": FASHION_CLASSES}  # by a hash of the validation labels

_NAME = re.compile(r"(train|t10k)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")

_UNSIGNED_BYTE = 8  # the third byte of the magic number

_AXES = {"images": 3, "labels": 1}

_COPY_AGAIN = "copy or download it again"


def is_idx_file(name: str) -> bool:
    """Whether a file name is that of an IDX file, with `-` or `.` before `idx`."""
    return _NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class IdxFiles:
    """A folder with the four files. The `t10k` files are the validation split.

    Raises: SourceError if a file is missing.
    """

    root: Path
    class_names: Sequence[str] | None = None
    """Names of the classes, in the order of their labels. None: Fashion-MNIST's, or the labels."""
    layout: ClassVar[str] = "IDX files"

    def __post_init__(self) -> None:
        for split in FILE_PREFIXES:
            for kind in _AXES:
                self._find(split, kind)

    def list_files(self) -> list[tuple[str, int]]:
        """Returns the names and sizes of the four files."""
        paths = [self._find(split, kind) for split in FILE_PREFIXES for kind in _AXES]
        return [(path.name, path.stat().st_size) for path in paths]

    def list_images(self, labels: str) -> Listing:
        """Lists the images. Their names are `<split>/<label>/<number>.pgm`.

        Raises: SourceError if a file is damaged or is not what its name says, or if the class names do not fit.
        """
        if labels == "imagenet":
            raise SourceError(f"data.labels is imagenet, and {self.layout} have labels of their own: set it to own")
        labels_of = {split: self._read_labels(split) for split in FILE_PREFIXES}
        found = np.unique(labels_of["train"]).tolist()
        width = len(str(max(found, default=0)))  # so that names sort as numbers do
        builder = ListingBuilder(self.layout)
        for split, labels_N in labels_of.items():
            path = self._find(split, "images")
            num, height, width_px = read_idx(path, "images").shape
            if num != len(labels_N):
                raise SourceError(
                    f"{path} has {num:,} images and {self._find(split, 'labels')} has {len(labels_N):,} labels: "
                    f"one of them belongs to another data set or split"
                )
            size = len(pgm_header(height, width_px)) + height * width_px
            for number, label in enumerate(labels_N.tolist()):
                builder.add(
                    split,
                    f"{label:0{width}d}",
                    f"{number:05d}.pgm",
                    path.name,
                    offset=number * height * width_px,
                    size=size,
                    stored_size=height * width_px,
                    compression=GREY_PIXELS,
                )
        expected = [f"{label:0{width}d}" for label in found]
        listing = builder.build(labels, expected, f"are labels in {self._find('train', 'labels')}")
        return replace(listing, classes=self._name_classes(found, labels_of["val"]))

    def _name_classes(self, found: Sequence[int], val_labels: np.ndarray) -> list[str]:
        names = self.class_names or _KNOWN_CLASSES.get(_hash_labels(val_labels)) or [str(label) for label in found]
        if len(names) != len(found):
            raise SourceError(
                f"data.class_names has {len(names)} names, and {self._find('train', 'labels')} has {len(found)} "
                f"different labels, {found[0]} to {found[-1]}: give one name for each"
            )
        return list(names)

    def _read_labels(self, split: str) -> np.ndarray:
        path = self._find(split, "labels")
        labels_N = read_idx(path, "labels")
        if not len(labels_N):
            raise SourceError(f"{path} has no labels")
        return labels_N

    def _find(self, split: str, kind: str) -> Path:
        """Returns the path of a file. A plain file is preferred to a compressed one."""
        prefix, axes = FILE_PREFIXES[split], _AXES[kind]
        names = [f"{prefix}-{kind}{dot}idx{axes}-ubyte{gz}" for gz in ("", ".gz") for dot in "-."]
        for name in names:
            if (self.root / name).is_file():
                return self.root / name
        raise SourceError(f"{self.root / names[0]} not found, neither plain nor as .gz: {_list(names)} may be its name")


def read_idx(path: Path, kind: str) -> np.ndarray:
    """Returns the images (num, height, width) or the labels (num,) of an IDX file, as read-only uint8.

    A plain file is mapped into memory. A compressed one is decompressed, and kept until another one is read.

    Raises: SourceError if the file cannot be read, has another magic number, or is shorter or longer than it says.
    """
    try:
        if path.suffix == ".gz":
            content = _decompress(path, path.stat().st_mtime_ns)
        else:
            content = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror or error}): {_COPY_AGAIN}") from None
    except (EOFError, zlib.error) as error:
        raise SourceError(f"{path} is truncated or damaged ({error}): {_COPY_AGAIN}") from None
    axes = _AXES[kind]
    header_size = 4 + 4 * axes
    magic, expected = content[:4].tobytes(), bytes([0, 0, _UNSIGNED_BYTE, axes])
    if magic != expected:
        found = {bytes([0, 0, _UNSIGNED_BYTE, number]): name for name, number in _AXES.items()}.get(magic)
        raise SourceError(
            f"{path} is not an IDX file of {kind}: it starts with {magic.hex(' ') or 'nothing'} instead of "
            f"{expected.hex(' ')}" + (f", as a file of {found} does: rename it" if found else f": {_COPY_AGAIN}")
        )
    if len(content) < header_size:
        raise SourceError(f"{path} ends within its header, after {len(content)} bytes: {_COPY_AGAIN}")
    shape = tuple(np.frombuffer(content[4:header_size].tobytes(), ">u4").tolist())
    if len(content) != (expected_size := header_size + math.prod(shape)):
        raise SourceError(
            f"{path} has {len(content):,} bytes instead of {expected_size:,}, by its own header: {_COPY_AGAIN}"
        )
    return content[header_size:].reshape(shape)


def pgm_header(height: int, width: int) -> bytes:
    """Returns what turns height * width bytes into a PGM: https://netpbm.sourceforge.net/doc/pgm.html."""
    return f"P5 {width} {height} 255\n".encode()


def _hash_labels(labels_N: np.ndarray) -> str:
    return hashlib.sha256(labels_N.tobytes()).hexdigest()[:16]


@lru_cache(maxsize=1)
def _decompress(path: Path, _mtime_ns: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8)


def _list(names: Iterable[str]) -> str:
    *rest, last = names
    return f"{', '.join(rest)} or {last}"
