"""A folder tree of images: `train/<class>/*` and `val/<class>/*`, as Imagenette and ImageNet-100 come."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.sources.listing import SPLITS, Collector, Listing, SourceError, in_threads, is_image, some

OTHER_NAMES = {"train": ("training", "Train"), "val": ("validation", "valid", "Val", "test")}
"""What the splits' folders are called elsewhere."""
_THREADS = 16  # they wait for the file system, which on a network answers many at a time


@dataclass(frozen=True)
class FolderTree:
    """`root/{train,val}/<class>/*`. Raises: SourceError if a split's folder is missing or has none for the classes."""

    root: Path
    layout: ClassVar[str] = "a folder tree"

    def __post_init__(self) -> None:
        for split in SPLITS:
            if not (self.root / split).is_dir():
                raise SourceError(f"{self.root / split} not found: images must lie in train/<class>/ and val/<class>/ "
                                  f"of {self.root}{_other_name(self.root, split)}")
            folders, files = contents(self.root / split)
            if not folders:
                raise SourceError(f"{self.root / split} holds {some(files) or 'nothing'}, but should hold a folder for "
                                  f"each class{_kaggle(self.root)}")

    def files(self) -> list[tuple[str, int]]:
        """Names, relative to the root, and sizes of the files of all classes, images or not."""
        found = []
        for split in SPLITS:
            for folder, files in walk(self.root / split):
                found += [(f"{split}/{folder}/{name}", size) for name, size in files]
        return found

    def scan(self, labels: str) -> Listing:
        """Lists the images. Raises: SourceError for a tree of another shape."""
        found, classes = Collector(self.layout), {}
        for split in SPLITS:
            classes[split], loose = contents(self.root / split)
            if images := [name for name in loose if is_image(name)]:
                raise SourceError(f"{self.root / split} holds {some(images)} outside of the classes' folders: move or "
                                  f"remove them")
            found.ignored += [f"{split}/{name}" for name in loose]
            for folder, files in walk(self.root / split):
                for name, size in files:
                    found.add(split, folder, name, f"{split}/{folder}/{name}", size=size)
        return found.listing(labels, classes["train"], f"has a folder in {self.root / 'train'}")


def walk(folder: Path) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """The folders in a folder, in sorted order, each with the names and sizes of its files."""
    names, _ = contents(folder)
    yield from zip(names, in_threads(_THREADS, lambda name: sizes(folder / name), names), strict=True)


def sizes(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes of the files in a folder, in sorted order; hidden ones are left out.

    Raises: SourceError if there is a folder among them, or a link to nowhere.
    """
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                raise SourceError(f"{entry.path} is a folder: the images of a class must lie in {folder} itself")
            try:
                found.append((entry.name, entry.stat().st_size))
            except FileNotFoundError:
                raise SourceError(f"{entry.path} is a link to what is not there: mend or remove it") from None
    return sorted(found)


def contents(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder, both sorted; hidden ones are left out."""
    with os.scandir(folder) as entries:
        seen = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    return sorted(name for name, is_dir in seen if is_dir), sorted(name for name, is_dir in seen if not is_dir)


def _other_name(root: Path, split: str) -> str:
    for name in OTHER_NAMES[split]:
        if (root / name).is_dir():
            return f"; {root / name} is there: if it is meant, rename it or link to it, `ln -s {name} {root / split}`"
    return ""


def _kaggle(root: Path) -> str:
    if root.parts[-3:] == ("ILSVRC", "Data", "CLS-LOC"):
        return f"; these are Kaggle's files: let data.source name {root.parents[2]}"
    return ""
