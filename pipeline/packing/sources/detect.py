"""Detects the layout of the images at `data.source`.

`detect_source` returns a `Source`, which lists its images as one table without extracting anything. Shards are packed
from this `Listing`. Existing shards are indexed in place instead (pipeline.packing.indexing).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol

from pipeline.base.errors import SourceError
from pipeline.base.images import IMAGE_SUFFIXES, is_system_file
from pipeline.packing.sources import archives, idx, kaggle
from pipeline.packing.sources.archives import Archives
from pipeline.packing.sources.class_folders import ClassFolders, has_class_folders
from pipeline.packing.sources.folder import FolderTree
from pipeline.packing.sources.idx import IdxFiles
from pipeline.packing.sources.kaggle import KaggleFolder, KaggleZip
from pipeline.packing.sources.listing import DEFLATED, IMAGES_SCHEMA, NOT_ZIPPED, STORED, Listing, format_names
from pipeline.shards import locations, store
from pipeline.shards.manifests import SPLITS

__all__ = [
    "DEFLATED",
    "ExistingShards",
    "IMAGES_SCHEMA",
    "IMAGE_SUFFIXES",
    "Listing",
    "NOT_ZIPPED",
    "STORED",
    "Source",
    "SourceError",
    "detect_source",
]


class Source(Protocol):
    """A source of images in one of the supported layouts."""

    layout: ClassVar[str]
    """Name of the layout, such as "the official archives" or "a folder tree"."""

    @property
    def root(self) -> Path:
        """Folder to which file names are relative."""
        ...

    def list_files(self) -> list[tuple[str, int]]:
        """Returns the names and sizes of its files, which change when an image changes."""
        ...

    def list_images(self, labels: str) -> Listing:
        """Lists all images. Raises: SourceError, naming what is missing, truncated or invalid."""
        ...


@dataclass(frozen=True)
class ExistingShards:
    """Existing WebDataset tars, which are indexed in place."""

    location: str
    """Folder or fsspec URL."""
    layout: ClassVar[str] = "WebDataset shards"

    def list_files(self) -> list[tuple[str, int]]:
        """Returns the names and sizes of the tars and of the manifest. Raises: ShardError if they cannot be listed."""
        sizes = locations.list_files(self.location)
        return [(name, size) for name, size in sizes.items() if name.endswith(".tar") or name == "manifest.json"]


def detect_source(
    source: str, class_names: Sequence[str] | None = None, hint: str | None = None
) -> Source | ExistingShards:
    """Detects the layout of `source` without listing its images.

    Args:
        class_names: names of the classes of IDX files, as data.class_names.
        hint: how to get the images, as data.source_hint.

    Raises: SourceError, with what was expected and what was found; or if there are class names for a layout that names
        its classes itself.
    """
    found = _detect_source(source, hint)
    if class_names is None:
        return found
    if not isinstance(found, IdxFiles):
        raise SourceError(
            f"data.class_names is for IDX files, and {source}, {found.layout}, names its classes: remove it"
        )
    return replace(found, class_names=class_names)


def _detect_source(source: str, hint: str | None) -> Source | ExistingShards:
    if store.is_url(source):
        return ExistingShards(source)
    path = Path(source).expanduser()
    if path.is_file():
        return _detect_file(path)
    if not path.is_dir():
        raise SourceError(f"missing data folder: {path} not found. {hint or _LAYOUTS_HINT}")
    found = _detect_folder(path)
    if found is None:
        raise SourceError(
            f"{path} contains {_describe_contents(path)}, which is not a supported layout{_suggest_folder(path)}. "
            f"{_LAYOUTS_HINT}"
        )
    return found


_LAYOUTS_HINT = (
    "Set data.source in params.yaml to one of: a folder with train/<class>/ and val/<class>/, or with <class>/ alone; "
    "a folder with "
    f"{', '.join(archives.REQUIRED_FILES)}; Kaggle's zip, or the folder into which it was extracted; "
    f"a folder with IDX files such as t10k-images-idx3-ubyte.gz; "
    f"a folder or URL with WebDataset shards, *train*.tar and *val*.tar"
)


def _detect_file(path: Path) -> Source:
    if path.suffix == ".zip":
        return KaggleZip(path)
    if path.name in archives.REQUIRED_FILES:
        raise SourceError(f"{path} is one of ImageNet's archives: set data.source to its folder, {path.parent}")
    if idx.is_idx_file(path.name):
        raise SourceError(f"{path} is one of four IDX files: set data.source to its folder, {path.parent}")
    raise SourceError(
        f"{path} is a file of an unsupported kind: extract it, and set data.source to the "
        f"folder that contains train and val"
    )


def _detect_folder(path: Path) -> Source | ExistingShards | None:
    names = {name for name in os.listdir(path) if not is_system_file(name)}
    if names & archives.REQUIRED_FILES.keys():
        return Archives(path)
    if "ILSVRC" in names or kaggle.SOLUTION in names:
        return KaggleFolder(path)
    if any((path / split).is_dir() for split in SPLITS):
        return FolderTree(path)
    if any(map(idx.is_idx_file, names)):
        return IdxFiles(path)
    tars = [name for name in names if name.endswith(".tar")]
    if "manifest.json" in names or all(any(split in name for name in tars) for split in SPLITS):
        return ExistingShards(str(path))
    zips = sorted(name for name in names if name.endswith(".zip"))
    if len(zips) > 1:
        raise SourceError(f"{path} contains {format_names(zips)}: set data.source to the one from Kaggle")
    if zips:
        return KaggleZip(path / zips[0])
    return ClassFolders(path) if has_class_folders(path) else None


def _describe_contents(path: Path) -> str:
    return format_names(os.listdir(path), 5) or "nothing"


def _suggest_folder(path: Path) -> str:
    """Returns a hint with the folder that was probably meant: the parent folder or a subfolder."""
    inside = [path / name for name in sorted(os.listdir(path))[:100] if (path / name).is_dir()]
    for near in (path.absolute().parent, *inside):
        with contextlib.suppress(SourceError, OSError):
            if found := _detect_folder(near):
                return f", but {near} is {found.layout}"
    return ""
