"""Sources of images: what lies at `data.source`, listed as one table whatever its layout; nothing is extracted.

`detect` says which layout it is. All but existing shards are then scanned into a Listing, from which the shards
are written; existing shards are indexed where they lie (pipeline.index).
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from pipeline import store
from pipeline.sources import archives, kaggle
from pipeline.sources.archives import Archives
from pipeline.sources.folder import FolderTree
from pipeline.sources.kaggle import KaggleFolder, KaggleZip
from pipeline.sources.listing import (
    DEFLATED,
    IMAGE_SUFFIXES,
    IMAGES,
    PLAIN,
    SPLITS,
    STORED,
    Listing,
    SourceError,
    some,
)

__all__ = ["DEFLATED", "ExistingShards", "IMAGES", "IMAGE_SUFFIXES", "Listing", "PLAIN", "STORED", "Source",
           "SourceError", "detect"]


class Source(Protocol):
    """Images in one of the layouts."""

    layout: ClassVar[str]
    """What it is, in words: "the official archives", "Kaggle's folder", "Kaggle's zip" or "a folder tree"."""

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

    def files(self) -> list[tuple[str, int]]:
        """Names and sizes of the tars, and of a manifest beside them. Raises: ShardError if they cannot be listed."""
        found = store.find(self.location)
        return [(name, size) for name, size in found.items() if name.endswith(".tar") or name == "manifest.json"]


def detect(source: str) -> Source | ExistingShards:
    """What lies at `source`, without looking through it.

    Raises: SourceError, saying what was looked for and what was found.
    """
    if store.is_url(source):
        return ExistingShards(source)
    path = Path(source).expanduser()
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        raise SourceError(f"missing data folder: {path} not found. {_LAYOUTS}")
    found = _folder(path)
    if found is None:
        raise SourceError(f"{path} holds {_told(path)}, none of what data.source may name{_nearby(path)}. {_LAYOUTS}")
    return found


_LAYOUTS = (
    "Set data.source in params.yaml to one of: a folder with train/<class>/ and val/<class>/; a folder with "
    f"{', '.join(archives.NEEDED)}; Kaggle's zip, or the folder into which it was extracted; a folder or URL with "
    "WebDataset shards, *train*.tar and *val*.tar"
)


def _file(path: Path) -> Source:
    if path.suffix == ".zip":
        return KaggleZip(path)
    if path.name in archives.NEEDED:
        raise SourceError(f"{path} is one of ImageNet's archives: let data.source name its folder, {path.parent}")
    raise SourceError(f"{path} is a file, and none that is read as it is: extract it, and let data.source name the "
                      f"folder that then holds train and val")


def _folder(path: Path) -> Source | ExistingShards | None:
    names = set(os.listdir(path))
    if names & archives.NEEDED.keys():
        return Archives(path)
    if "ILSVRC" in names or kaggle.SOLUTION in names:
        return KaggleFolder(path)
    if any((path / split).is_dir() for split in SPLITS):
        return FolderTree(path)
    tars = [name for name in names if name.endswith(".tar")]
    if "manifest.json" in names or all(any(split in name for name in tars) for split in SPLITS):
        return ExistingShards(str(path))
    zips = sorted(name for name in names if name.endswith(".zip"))
    if len(zips) > 1:
        raise SourceError(f"{path} holds {some(zips)}: let data.source name the one that is Kaggle's")
    return KaggleZip(path / zips[0]) if zips else None


def _told(path: Path) -> str:
    return some(os.listdir(path), 5) or "nothing"


def _nearby(path: Path) -> str:
    """The folder that was probably meant: the one above, or one of those inside."""
    inside = [path / name for name in sorted(os.listdir(path))[:100] if (path / name).is_dir()]
    for near in (path.absolute().parent, *inside):
        with contextlib.suppress(SourceError, OSError):
            if found := _folder(near):
                return f", but {near} is {found.layout}"
    return ""
