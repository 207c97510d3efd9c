"""A source's images as a table, one row an image, the same names and labels whatever the layout."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import imagenet

T = TypeVar("T")
R = TypeVar("R")
logger = logging.getLogger(__name__)

SPLITS = ("train", "val")
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
PLAIN, STORED, DEFLATED = 0, 1, 2
"""How an image lies in its file: as it is, or as the member of a zip, stored or deflated."""
IMAGES = pa.schema([
    ("name", pa.string()),  # `<split>/<class>/<file>`, the same in every layout; rows are sorted by it
    ("label", pa.int64()),
    ("file", pa.string()),  # the file that holds the image, relative to the source's root
    ("offset", pa.int64()),  # in that file, bytes: of the image, or of its local header in a zip
    ("size", pa.int64()),  # of the image, bytes
    ("packed", pa.int64()),  # bytes that it takes in the file: less than `size` if deflated
    ("zipped", pa.int8()),  # PLAIN, STORED or DEFLATED
])
_CHUNK = 1 << 16  # rows that are Python objects at a time


class SourceError(ValueError):
    """The source cannot be read as images; the message names the file or folder, and what to do."""


@dataclass(frozen=True)
class Listing:
    """All images of a source."""

    layout: str
    """What the source was found to be, in words."""
    classes: list[str]
    """Names of the classes; a label is a place in this list."""
    splits: dict[str, pa.Table]
    """The images of `train` and `val`, each with the columns of IMAGES."""
    ignored: list[str]
    """Names of the files that are no images, by their suffix."""


@dataclass
class Collector:
    """Gathers the images that a layout finds, in any order, into a Listing; holds columns, not objects."""

    layout: str
    ignored: list[str] = field(default_factory=list)
    _classes: dict[str, int] = field(default_factory=dict)
    _trained: set[str] = field(default_factory=set)
    _rows: dict[str, list[tuple]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    _chunks: dict[str, list[pa.Table]] = field(default_factory=lambda: {split: [] for split in SPLITS})

    def add(
        self, split: str, label: str, image: str, file: str, *,
        offset: int = 0, size: int, packed: int | None = None, zipped: int = PLAIN,
    ) -> None:
        """Takes the image of that file name and class in; a name without an image's suffix is only noted."""
        name = f"{split}/{label}/{image}"
        if not is_image(image):
            self.ignored.append(name)
            return
        code = self._classes.setdefault(label, len(self._classes))
        if split == "train":
            self._trained.add(label)
        rows = self._rows[split]
        rows.append((name, code, file, offset, size, size if packed is None else packed, zipped))
        if len(rows) == _CHUNK:
            self._flush(split)

    def listing(self, labels: str, expected: Collection[str], told: str) -> Listing:
        """The listing, once all images are in.

        `expected` are the classes that there must be, and `told` says for people who wants them.
        Raises: SourceError for a split without images, a class that lacks training images or is not expected,
        a name that comes twice, or a class that has no label.
        """
        for split in SPLITS:
            self._flush(split)
            if not self._chunks[split]:
                raise SourceError(f"{self.layout}: no images in {split}")
        if missing := set(expected) - self._trained:
            raise SourceError(f"no training images of {some(missing)}, which {told}")
        if foreign := self._classes.keys() - set(expected):
            raise SourceError(f"{some(foreign)}: no such class in what {told}")
        classes = _classes(self._classes, labels)
        place = {name: number for number, name in enumerate(classes)}
        label_of = pa.array([place[name] for name in self._classes], pa.int64())
        splits = {split: _sorted(self._chunks.pop(split), label_of) for split in SPLITS}
        if imagenet.all_there(self._classes):
            _compare_counts(self.layout, splits)
        return Listing(self.layout, classes, splits, sorted(self.ignored))

    def _flush(self, split: str) -> None:
        if rows := self._rows[split]:
            try:
                columns = zip(zip(*rows, strict=True), IMAGES.types, strict=True)
                chunk = pa.table([pa.array(column, kind) for column, kind in columns], schema=IMAGES)
            except UnicodeEncodeError as error:
                raise SourceError(f"{error.object!r}: a name that is not UTF-8; rename it") from None
            self._chunks[split].append(chunk)
            rows.clear()


def is_image(name: str) -> bool:
    """Whether a file is an image, by its name."""
    stem, dot, suffix = name.rpartition(".")
    return bool(stem) and f"{dot}{suffix.lower()}" in IMAGE_SUFFIXES


def in_threads(threads: int, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """The results in the order of the items, computed by threads that run only a little ahead of who takes them."""
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(items), 4 * threads):
            yield from pool.map(function, items[start : start + 4 * threads])


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few of the names, in order, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}"


def _classes(found: Iterable[str], labels: str) -> list[str]:
    """The classes, each at the place that is its label: those found, sorted, or all of ImageNet's."""
    classes = sorted(found)
    if imagenet.all_there(classes) and classes != list(imagenet.wnids()):
        raise SourceError("timm's table of ImageNet's classes is not in the order of the wnids, as all labels are: "
                          "install the version of timm that constraints.txt names")
    if labels != "imagenet":
        return classes
    if unknown := set(classes) - set(imagenet.wnids()):
        raise SourceError(f"data.labels is imagenet, but none of ImageNet's 1,000 classes, such as "
                          f"{imagenet.wnids()[0]}, is called {some(unknown)}: rename the classes, or set data.labels "
                          f"to own")
    return list(imagenet.wnids())


def _compare_counts(layout: str, splits: dict[str, pa.Table]) -> None:
    for split, images in splits.items():
        if len(images) != imagenet.COUNTS[split]:
            logger.warning(f"{layout}: the classes are ImageNet's, but {split} has {len(images):,} images instead of "
                           f"{imagenet.COUNTS[split]:,}: some are missing, or it is a subset")


def _sorted(chunks: list[pa.Table], label_of: pa.Array) -> pa.Table:
    table = pa.concat_tables(chunks)
    chunks.clear()
    table = table.sort_by("name").combine_chunks()
    names = table["name"]
    again = pc.call_function("equal", [names[1:], names[:-1]])
    if repeated := names[1:].filter(again).unique().to_pylist():
        raise SourceError(f"{some(repeated)}: there are two of that name; remove or rename one")
    return table.set_column(1, IMAGES.field("label"), label_of.take(table["label"].combine_chunks()))
