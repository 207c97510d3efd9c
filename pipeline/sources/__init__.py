"""Sources of images: what lies at `data.source`, listed as one table whatever its layout; nothing is extracted.

`detect` says which layout it is. All but existing shards are then scanned into a Listing, from which the shards
are written; existing shards are indexed where they lie (pipeline.index).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from pipeline.sources.folder import FolderTree
from pipeline.sources.listing import DEFLATED, IMAGE_SUFFIXES, IMAGES, PLAIN, STORED, Listing, SourceError, class_list

__all__ = ["DEFLATED", "ExistingShards", "IMAGES", "IMAGE_SUFFIXES", "Listing", "PLAIN", "STORED", "Source",
           "SourceError", "class_list", "detect"]


class Source(Protocol):
    """Images in one of the layouts."""

    @property
    def layout(self) -> str:
        """What it is, in words: "the official archives", "Kaggle's folder", "Kaggle's zip", "a folder tree"."""
        ...

    @property
    def root(self) -> Path:
        """Folder to which the names of files are relative."""
        ...

    def files(self) -> list[tuple[str, int]]:
        """Names and sizes of the files that it consists of: what changes when an image does."""
        ...

    def scan(self, labels: str) -> Listing:
        """Lists all images. Raises: SourceError, naming what is missing, cut or not as it should be."""
        ...


@dataclass(frozen=True)
class ExistingShards:
    """WebDataset tars that are there already, to be indexed where they lie."""

    location: str
    """Folder or fsspec URL."""
    layout: ClassVar[str] = "WebDataset shards"


def detect(source: str) -> Source | ExistingShards:
    """What lies at `source`, without looking through it.

    Raises: SourceError, saying what was looked for and what was found.
    """
    if "://" in source:
        return ExistingShards(source)
    root = Path(source).expanduser()
    if (root / "manifest.json").is_file():
        return ExistingShards(str(root))
    return FolderTree(root)
