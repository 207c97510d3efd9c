"""Images in one folder for each class, without a split: `<class>/*`, the layout of EuroSAT and PatternNet."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.base.errors import SourceError
from pipeline.base.images import is_image
from pipeline.packing.sources.folder import OTHER_NAMES, iter_class_folders, list_contents
from pipeline.packing.sources.listing import Listing, ListingBuilder, format_names
from pipeline.shards.manifests import SPLITS

VAL_FRACTION = 0.2
"""Share of the images of each class that are validation images."""


@dataclass(frozen=True)
class ClassFolders:
    """`root/<class>/*`. A fifth of the images of each class, chosen by a hash of their names, are for validation."""

    root: Path
    layout: ClassVar[str] = "class folders without a split"

    def list_files(self) -> list[tuple[str, int]]:
        """Returns the names, relative to the root, and sizes of the files of all classes, including other files."""
        return [(f"{folder}/{name}", size) for folder, files in iter_class_folders(self.root) for name, size in files]

    def list_images(self, labels: str) -> Listing:
        """Lists the images. Raises: SourceError for images outside of the class folders."""
        classes, stray_files = list_contents(self.root)
        if images := [name for name in stray_files if is_image(name)]:
            raise SourceError(
                f"{self.root} contains {format_names(images)} outside of the class folders: move or remove them"
            )
        found = ListingBuilder(self.layout, ignored=stray_files)
        for folder, files in iter_class_folders(self.root):
            val = choose_validation_images(folder, [name for name, _ in files if is_image(name)])
            for name, size in files:
                split = "val" if name in val else "train"
                found.add(split, folder, name, f"{folder}/{name}", size=size)
        return found.build(labels, classes, f"has a folder in {self.root}")


def choose_validation_images(class_name: str, names: list[str]) -> set[str]:
    """Returns `VAL_FRACTION` of the names, those whose hashes are lowest; at least one of two names, and no seed."""
    ranked = sorted(
        names, key=lambda name: hashlib.sha256(f"{class_name}/{name}".encode(errors="surrogateescape")).digest()
    )
    count = max(1, round(VAL_FRACTION * len(names))) if len(names) > 1 else 0
    return set(ranked[:count])


def has_class_folders(root: Path) -> bool:
    """Whether the folder has two or more subfolders, the first with an image directly in it, and is not one split."""
    if root.absolute().name in (*SPLITS, *OTHER_NAMES["train"], *OTHER_NAMES["val"]):
        return False
    folders, _ = list_contents(root)
    return len(folders) > 1 and any(map(is_image, list_contents(root / folders[0])[1]))
