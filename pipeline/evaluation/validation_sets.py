"""Further validation sets: folders `<class>/*` that are read without packing, such as ImageNet-V2 (Recht et al. 2019).

A model chooses among all classes of the data, even if a set has images of only some of them. Published figures for
ImageNet-A and -R are higher, because there the model chooses among their 200 classes.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flopeq.models.build import did_you_mean
from pipeline.base import imagenet
from pipeline.base.errors import SourceError
from pipeline.base.images import is_image, is_system_file
from pipeline.base.schema import Data
from pipeline.loading.decode import decode_image

logger = logging.getLogger(__name__)

RESERVED_PREFIXES = frozenset({"best", "complexity", "difference", "equivariance", "perf", "seeds", "train", "val"})
"""Prefixes of the other metrics, which a further set cannot have as its name."""

_MAX_LISTED = 5  # classes that an error message lists


class FolderDataset:
    """The images of a folder, sorted by class and name, for `batching.val_batches`.

    Raises: SourceError, which names an image that cannot be read.
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[int]) -> None:
        self.paths = paths
        self.labels = torch.tensor(labels)
        """(num_images,) int64."""

    def __len__(self) -> int:
        return len(self.paths)

    def read_jpegs(self, rows: Sequence[int]) -> list[bytes]:
        """Returns the contents of the files."""
        try:
            return [self.paths[row].read_bytes() for row in rows]
        except OSError as error:
            raise SourceError(f"{error.filename} cannot be read ({error.strerror})") from None

    def decode(self, row: int, jpeg: bytes) -> Tensor:
        """Returns the image of that row as uint8 (3, H, W)."""
        try:
            return decode_image(jpeg)
        except ValueError as error:
            raise SourceError(f"{self.paths[row]} cannot be read ({error}): replace or remove it") from None


def check_further_sets(data: Data) -> None:
    """Checks that the folders exist and are named by class, as far as the classes are known before packing.

    Raises: SourceError, which names the set, what was found and what is needed.
    """
    classes = imagenet.wnids() if data.labels == "imagenet" else None
    for name, folder in data.further_val.items():
        found = _list_images(name, folder)
        if classes:
            _label_by_class(name, folder, found, classes)


def load_further_set(name: str, folder: Path, classes: Sequence[str]) -> FolderDataset:
    """Loads a further set with the labels of `classes`. Raises: SourceError, as `check_further_sets` does."""
    found = _list_images(name, folder)
    label_of = _label_by_class(name, folder, found, classes)
    pairs = [(path, label_of[label]) for label, paths in found.items() for path in paths]
    return FolderDataset(*zip(*pairs, strict=True))


def _list_images(name: str, folder: Path) -> dict[str, list[Path]]:
    """Returns the images of each class, sorted."""
    where = f"data.further_val.{name}: {folder}"
    if name in RESERVED_PREFIXES:
        raise SourceError(f"{where}: this name is reserved for other metrics: rename the set")
    if not folder.is_dir():
        found = "is a file: unpack it" if folder.exists() else "not found"
        raise SourceError(f"{where} {found}; images must lie in {folder}/<class>/")
    found, ignored = {}, 0
    for label in sorted(entry.name for entry in _visible_entries(folder) if entry.is_dir()):
        paths = sorted(Path(entry.path) for entry in _visible_entries(folder / label) if entry.is_file())
        images = [path for path in paths if is_image(path.name)]
        ignored += len(paths) - len(images)
        if images:
            found[label] = images
    if not found:
        raise SourceError(f"{where} holds no images: they must lie in {folder}/<class>/")
    if ignored:
        logger.info("%s: %d files without an image suffix are ignored", folder, ignored)
    return found


def _visible_entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    return (entry for entry in os.scandir(folder) if not is_system_file(entry.name))


def _label_by_class(name: str, folder: Path, found: Mapping[str, object], classes: Sequence[str]) -> dict[str, int]:
    """Returns the label of each class name: its index in `classes`, or, for ImageNet, the number that is its name."""
    label_of = {class_: label for label, class_ in enumerate(classes)}
    expected = "the data's classes"
    if tuple(classes) == imagenet.wnids():
        expected += " or by ImageNet's labels, 0 to 999"
        if all(class_.isdecimal() for class_ in found):
            label_of = {str(label): label for label in range(len(classes))}
    if unknown := [class_ for class_ in found if class_ not in label_of]:
        listed = ", ".join(unknown[:_MAX_LISTED]) + (", ..." if len(unknown) > _MAX_LISTED else "")
        raise SourceError(
            f"data.further_val.{name}: folders of {folder} must be named by {expected}; "
            f"{len(unknown)} of {len(found)} are not: {listed}{did_you_mean(unknown[0], label_of)}"
        )
    return label_of


_KEY = re.compile(r"ILSVRC2012_val_\d{8}(?!\d)")

_NUM_IMAGES = 50_000

RealLabels = list[list[int]]
"""The labels of each image, by row."""


def real_labels(classes: Sequence[str], keys: Sequence[str]) -> RealLabels | None:
    """Returns the reassessed labels of the images with these keys, or None.

    They exist if the classes are ImageNet's 1,000 in their order and all images are ImageNet validation images.
    """
    if tuple(classes) != imagenet.wnids():
        return None
    names = [f"{found[0]}.JPEG" for key in keys if (found := _KEY.search(key))]
    if len(names) < len(keys):
        return None
    from timm.data import RealLabelsImagenet

    known: dict[str, list[int]] = RealLabelsImagenet(range(_NUM_IMAGES)).real_labels  # timm only counts the names
    found = [known[name] for name in names if name in known]
    return found if len(found) == len(keys) and any(found) else None


def real_top1_pct(predicted: Sequence[int], labels: RealLabels) -> float:
    """Returns the percentage of labelled images whose predicted class is among their labels."""
    hits = [class_ in allowed for class_, allowed in zip(predicted, labels, strict=True) if allowed]
    return 100 * sum(hits) / len(hits)
