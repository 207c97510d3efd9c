"""Further validation sets: folders `<class>/*` that are read as they lie, such as ImageNet-V2 (Recht et al. 2019).

A network chooses among all classes of the data, also where a set has images of some only: figures published for
ImageNet-A and -R, which let it choose among their 200, are higher.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flopeq.build import nearest
from pipeline import imagenet
from pipeline.config import Data
from pipeline.decode import decode
from pipeline.sources import IMAGE_SUFFIXES, SourceError

logger = logging.getLogger(__name__)

TAKEN = frozenset({"complexity", "equivariance", "perf", "train", "val"})
"""What metrics that are not of a further set begin with."""
_NAMED = 5  # classes that an error lists


class FolderImages:
    """The images of a folder, sorted by class and name, as `data.val_batches` takes them.

    Raises: SourceError for an image that cannot be read, naming it.
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[int]) -> None:
        self.paths = paths
        self.labels = torch.tensor(labels)
        """(num_images,) int64."""

    def __len__(self) -> int:
        return len(self.paths)

    def jpegs(self, rows: Sequence[int]) -> list[bytes]:
        """The files' contents."""
        try:
            return [self.paths[row].read_bytes() for row in rows]
        except OSError as error:
            raise SourceError(f"{error.filename} cannot be read ({error.strerror})") from None

    def decode(self, row: int, jpeg: bytes) -> Tensor:
        """uint8 (3, H, W) of the image of that row."""
        try:
            return decode(jpeg)
        except ValueError as error:
            raise SourceError(f"{self.paths[row]} cannot be read ({error}): replace or remove it") from None


def check(data: Data) -> None:
    """Whether the folders are there and named by class, as far as classes are known before there are shards.

    Raises: SourceError, naming the set, what was found and what is needed.
    """
    classes = imagenet.wnids() if data.labels == "imagenet" else None
    for name, folder in data.further_val.items():
        found = _list(name, folder)
        if classes:
            _labels(name, folder, found, classes)


def load(name: str, folder: Path, classes: Sequence[str]) -> FolderImages:
    """A further set with the labels of those classes. Raises: SourceError, as `check` does."""
    found = _list(name, folder)
    label_of = _labels(name, folder, found, classes)
    pairs = [(path, label_of[label]) for label, paths in found.items() for path in paths]
    return FolderImages(*zip(*pairs, strict=True))


def _list(name: str, folder: Path) -> dict[str, list[Path]]:
    """The images of each class, in sorted order."""
    where = f"data.further_val.{name}: {folder}"
    if name in TAKEN:
        raise SourceError(f"{where}: metrics of that name are others': give the set another name")
    if not folder.is_dir():
        found = "is a file: unpack it" if folder.exists() else "not found"
        raise SourceError(f"{where} {found}; images must lie in {folder}/<class>/")
    found, ignored = {}, 0
    for label in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()):
        paths = sorted(Path(entry.path) for entry in os.scandir(folder / label) if entry.is_file())
        images = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
        ignored += len(paths) - len(images)
        if images:
            found[label] = images
    if not found:
        raise SourceError(f"{where} holds no images: they must lie in {folder}/<class>/")
    if ignored:
        logger.info("%s: %d files that are no images, by their suffix, are left out", folder, ignored)
    return found


def _labels(name: str, folder: Path, found: Mapping[str, object], classes: Sequence[str]) -> dict[str, int]:
    """The label of each class in the folder: its place among the data's, or, for ImageNet's, its name."""
    label_of = {class_: label for label, class_ in enumerate(classes)}
    asked = "the data's classes"
    if tuple(classes) == imagenet.wnids():
        asked += " or by ImageNet's labels, 0 to 999"
        if all(class_.isdecimal() for class_ in found):
            label_of = {str(label): label for label in range(len(classes))}
    if unknown := [class_ for class_ in found if class_ not in label_of]:
        named = ", ".join(unknown[:_NAMED]) + (", ..." if len(unknown) > _NAMED else "")
        raise SourceError(
            f"data.further_val.{name}: folders of {folder} are to be named by {asked}; "
            f"{len(unknown)} of {len(found)} are not: {named}{nearest(unknown[0], label_of)}"
        )
    return label_of
