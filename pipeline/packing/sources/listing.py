"""The images of a source as a table with one row per image. Names and labels do not depend on the layout."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base import imagenet
from pipeline.base.errors import SourceError
from pipeline.base.images import is_image
from pipeline.shards.manifests import SPLITS

T = TypeVar("T")

R = TypeVar("R")

logger = logging.getLogger(__name__)

NOT_ZIPPED, STORED, DEFLATED, GREY_PIXELS = 0, 1, 2, 3
"""How an image is stored in its file: directly, as a stored or deflated member of a zip, or as its pixels alone."""

IMAGES_SCHEMA = pa.schema(
    [
        ("name", pa.string()),  # `<split>/<class>/<file>`, the same in every layout; rows are sorted by it
        ("label", pa.int64()),
        ("file", pa.string()),  # the file that holds the image, relative to the source's root
        (
            "offset",
            pa.int64(),
        ),  # in bytes, of the image in that file, of its local header in a zip, or in IDX pixels
        ("size", pa.int64()),  # of the image, bytes
        (
            "stored_size",
            pa.int64(),
        ),  # its size in the file, in bytes: other than `size` if deflated or pixels alone
        ("compression", pa.int8()),  # NOT_ZIPPED, STORED, DEFLATED or GREY_PIXELS
    ]
)

_CHUNK_ROWS = 1 << 16  # number of rows that are Python objects at a time


@dataclass(frozen=True)
class Listing:
    """All images of a source."""

    layout: str
    """The detected layout of the source, in words."""
    classes: list[str]
    """Names of the classes. A label is an index into this list."""
    splits: dict[str, pa.Table]
    """The images of `train` and `val`, each with the columns of IMAGES_SCHEMA."""
    ignored: list[str]
    """Names of the files that are not images, judging by their suffix."""


@dataclass
class ListingBuilder:
    """Collects the images of a source, in any order, into a Listing. Holds columns instead of objects to save
    memory."""

    layout: str
    ignored: list[str] = field(default_factory=list)
    _classes: dict[str, int] = field(default_factory=dict)
    _train_classes: set[str] = field(default_factory=set)
    _rows: dict[str, list[tuple]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    _chunks: dict[str, list[pa.Table]] = field(default_factory=lambda: {split: [] for split in SPLITS})

    def add(
        self,
        split: str,
        label: str,
        image: str,
        file: str,
        *,
        offset: int = 0,
        size: int,
        stored_size: int | None = None,
        compression: int = NOT_ZIPPED,
    ) -> None:
        """Adds an image of the class `label`. A file without an image suffix is only added to `ignored`."""
        name = f"{split}/{label}/{image}"
        if not is_image(image):
            self.ignored.append(name)
            return
        code = self._classes.setdefault(label, len(self._classes))
        if split == "train":
            self._train_classes.add(label)
        rows = self._rows[split]
        rows.append((name, code, file, offset, size, size if stored_size is None else stored_size, compression))
        if len(rows) == _CHUNK_ROWS:
            self._flush(split)

    def build(self, labels: str, expected: Collection[str], expected_from: str) -> Listing:
        """Returns the listing after all images were added.

        Args:
            labels: `own` or `imagenet`, as data.labels.
            expected: the classes that must exist.
            expected_from: where the expected classes come from, for error messages.
        Raises: SourceError for a split without images, a class that lacks training images or is not expected,
            a duplicate name, or a class without a label.
        """
        for split in SPLITS:
            self._flush(split)
            if not self._chunks[split]:
                raise SourceError(f"{self.layout}: no images in {split}")
        if missing := set(expected) - self._train_classes:
            raise SourceError(f"no training images of {format_names(missing)}, which {expected_from}")
        if unexpected := self._classes.keys() - set(expected):
            raise SourceError(f"{format_names(unexpected)}: not among the classes that {expected_from}")
        classes = _label_classes(self._classes, labels)
        label_of_name = {name: label for label, name in enumerate(classes)}
        label_of = pa.array([label_of_name[name] for name in self._classes], pa.int64())
        splits = {split: _sort_and_label(self._chunks.pop(split), label_of) for split in SPLITS}
        if imagenet.has_all_classes(self._classes):
            _warn_about_counts(self.layout, splits)
        return Listing(self.layout, classes, splits, sorted(self.ignored))

    def _flush(self, split: str) -> None:
        if rows := self._rows[split]:
            try:
                columns = zip(zip(*rows, strict=True), IMAGES_SCHEMA.types, strict=True)
                chunk = pa.table([pa.array(column, kind) for column, kind in columns], schema=IMAGES_SCHEMA)
            except UnicodeEncodeError as error:
                raise SourceError(f"{error.object!r}: the name is not valid UTF-8: rename the file") from None
            self._chunks[split].append(chunk)
            rows.clear()


def map_in_threads(threads: int, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Maps a function over the items in threads and yields the results in order. Runs only a few items ahead."""
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(items), 4 * threads):
            yield from pool.map(function, items[start : start + 4 * threads])


def format_names(names: Iterable[str], limit: int = 3) -> str:
    """Formats the first few names in sorted order, and the number of further ones."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}"


def _label_classes(found: Iterable[str], labels: str) -> list[str]:
    """Returns the classes in the order of their labels: the found classes, sorted, or all of ImageNet's."""
    classes = sorted(found)
    if imagenet.has_all_classes(classes) and classes != list(imagenet.wnids()):
        raise SourceError(
            "timm's table of ImageNet's classes is not in the order of the wnids, which defines the labels: "
            "install the version of timm in constraints.txt"
        )
    if labels != "imagenet":
        return classes
    if unknown := set(classes) - set(imagenet.wnids()):
        raise SourceError(
            f"data.labels is imagenet, but none of ImageNet's 1,000 classes, such as "
            f"{imagenet.wnids()[0]}, is called {format_names(unknown)}: rename the classes, or set data.labels "
            f"to own"
        )
    return list(imagenet.wnids())


def _warn_about_counts(layout: str, splits: dict[str, pa.Table]) -> None:
    for split, images in splits.items():
        if len(images) != imagenet.NUM_IMAGES[split]:
            logger.warning(
                f"{layout}: the classes are ImageNet's, but {split} has {len(images):,} images instead of "
                f"{imagenet.NUM_IMAGES[split]:,}: images are missing, or the data is a subset"
            )


def _sort_and_label(chunks: list[pa.Table], label_of: pa.Array) -> pa.Table:
    table = pa.concat_tables(chunks)
    chunks.clear()
    table = table.sort_by("name").combine_chunks()
    names = table["name"]
    is_repeated = pc.call_function("equal", [names[1:], names[:-1]])
    if repeated := names[1:].filter(is_repeated).unique().to_pylist():
        raise SourceError(f"{format_names(repeated)}: there are two images of that name: remove or rename one")
    return table.set_column(1, IMAGES_SCHEMA.field("label"), label_of.take(table["label"].combine_chunks()))
