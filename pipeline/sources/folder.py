"""A folder tree of images: `train/<class>/*` and `val/<class>/*`, as Imagenette and ImageNet-100 come."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.sources.listing import SPLITS, Collector, Listing, SourceError

THREADS = 16  # they wait for the file system, which on a network answers many at a time


@dataclass(frozen=True)
class FolderTree:
    """`root/{train,val}/<class>/*`."""

    root: Path
    layout: ClassVar[str] = "a folder tree"

    def files(self) -> list[tuple[str, int]]:
        """Names, relative to the root, and sizes of all files, images or not."""
        found = []
        for split in SPLITS:
            for folder, entries in walk(self.root / split):
                found += [(f"{split}/{folder}/{name}", size) for name, size in entries]
        return found

    def scan(self, labels: str) -> Listing:
        """Lists the images. Raises: SourceError for a tree of another shape."""
        found = Collector(self.layout)
        classes: dict[str, set[str]] = {split: set() for split in SPLITS}
        for split in SPLITS:
            for folder, entries in walk(self.root / split):
                classes[split].add(folder)
                for name, size in entries:
                    found.add(split, folder, name, f"{split}/{folder}/{name}", size=size)
        return found.listing(labels, classes["train"], f"has a folder in {self.root / 'train'}")


def walk(folder: Path) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """The folders in `folder`, in sorted order, each with the names and sizes of its files; hidden ones are left out.

    Raises: SourceError for a folder inside one of them, or a link to nowhere.
    """
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    with ThreadPoolExecutor(THREADS) as threads:
        yield from zip(names, threads.map(lambda name: sizes(folder / name), names), strict=True)


def sizes(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes of the files in a folder, in sorted order; hidden ones are left out."""
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
