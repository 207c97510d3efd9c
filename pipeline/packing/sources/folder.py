"""A folder tree of images: `train/<class>/*` and `val/<class>/*`, the layout of Imagenette and ImageNet-100."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.base.errors import SourceError
from pipeline.base.images import is_image, is_system_file
from pipeline.packing.sources.listing import Listing, ListingBuilder, format_names, map_in_threads
from pipeline.shards.manifests import SPLITS

OTHER_NAMES = {"train": ("training", "Train"), "val": ("validation", "valid", "Val", "test")}
"""Other common names of the folders of the splits."""

_THREADS = 16  # threads wait for the file system; a network file system serves many requests at a time


@dataclass(frozen=True)
class FolderTree:
    """`root/{train,val}/<class>/*`. Raises: SourceError if the folder of a split is missing or has no class folders."""

    root: Path
    layout: ClassVar[str] = "a folder tree"

    def __post_init__(self) -> None:
        for split in SPLITS:
            if not (self.root / split).is_dir():
                raise SourceError(
                    f"{self.root / split} not found: images must be in train/<class>/ and val/<class>/ "
                    f"of {self.root}{_suggest_rename(self.root, split)}"
                )
            folders, files = list_contents(self.root / split)
            if not folders:
                raise SourceError(
                    f"{self.root / split} contains {format_names(files) or 'nothing'}, but should contain a folder for "
                    f"each class{_kaggle_hint(self.root)}"
                )

    def list_files(self) -> list[tuple[str, int]]:
        """Returns the names, relative to the root, and sizes of the files of all classes, including other files."""
        found = []
        for split in SPLITS:
            for folder, files in iter_class_folders(self.root / split):
                found += [(f"{split}/{folder}/{name}", size) for name, size in files]
        return found

    def list_images(self, labels: str) -> Listing:
        """Lists the images. Raises: SourceError if the tree has another structure."""
        found, classes = ListingBuilder(self.layout), {}
        for split in SPLITS:
            classes[split], stray_files = list_contents(self.root / split)
            if images := [name for name in stray_files if is_image(name)]:
                raise SourceError(
                    f"{self.root / split} contains {format_names(images)} outside of the class folders: move or "
                    f"remove them"
                )
            found.ignored += [f"{split}/{name}" for name in stray_files]
            for folder, files in iter_class_folders(self.root / split):
                for name, size in files:
                    found.add(split, folder, name, f"{split}/{folder}/{name}", size=size)
        return found.build(labels, classes["train"], f"has a folder in {self.root / 'train'}")


def iter_class_folders(folder: Path) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Yields the subfolders of a folder in sorted order, each with the names and sizes of its files."""
    names, _ = list_contents(folder)
    yield from zip(names, map_in_threads(_THREADS, lambda name: file_sizes(folder / name), names), strict=True)


def file_sizes(folder: Path) -> list[tuple[str, int]]:
    """Returns the names and sizes of the files in a folder, sorted by name, without those that systems and editors add.

    Raises: SourceError if the folder contains a subfolder or a broken link.
    """
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_system_file(entry.name):
                continue
            if entry.is_dir():
                raise SourceError(f"{entry.path} is a folder: the images of a class must be directly in {folder}")
            try:
                found.append((entry.name, entry.stat().st_size))
            except FileNotFoundError:
                raise SourceError(f"{entry.path} is a broken link: fix or remove it") from None
    return sorted(found)


def list_contents(folder: Path) -> tuple[list[str], list[str]]:
    """Returns the names of the subfolders and of the files in a folder, both sorted, without those that systems add."""
    with os.scandir(folder) as entries:
        listed = [(entry.name, entry.is_dir()) for entry in entries if not is_system_file(entry.name)]
    return sorted(name for name, is_dir in listed if is_dir), sorted(name for name, is_dir in listed if not is_dir)


def _suggest_rename(root: Path, split: str) -> str:
    for name in OTHER_NAMES[split]:
        if (root / name).is_dir():
            return f"; {root / name} exists: if it is {split}, rename or link it: `ln -s {name} {root / split}`"
    return ""


def _kaggle_hint(root: Path) -> str:
    if root.parts[-3:] == ("ILSVRC", "Data", "CLS-LOC"):
        return f"; these are Kaggle's files: set data.source to {root.parents[2]}"
    return ""
