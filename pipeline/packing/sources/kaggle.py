"""ImageNet in Kaggle's layout, extracted or as a zip.

There is one folder of training images per class and a single folder of validation images. `LOC_val_solution.csv` has
the classes of the validation images and `LOC_synset_mapping.txt` lists all classes. Test images and annotations are
ignored.
"""

from __future__ import annotations

import csv
import io
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipeline.base.errors import SourceError
from pipeline.base.images import is_system_file
from pipeline.packing.sources.folder import file_sizes, iter_class_folders, list_contents
from pipeline.packing.sources.listing import DEFLATED, STORED, Listing, ListingBuilder, format_names

CLS_LOC = "ILSVRC/Data/CLS-LOC"

SOLUTION, MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"

TRAIN, VAL = f"{CLS_LOC}/train", f"{CLS_LOC}/val"

REQUIRED_FILES = {
    TRAIN: "the training images",
    VAL: "the validation images",
    SOLUTION: "the classes of the validation images",
    MAPPING: "the list of classes",
}

_COMPRESSION = {zipfile.ZIP_STORED: STORED, zipfile.ZIP_DEFLATED: DEFLATED}

_ENCRYPTED = 1  # bit of a member's flags


@dataclass(frozen=True)
class KaggleFolder:
    """The folder with the content of Kaggle's zip. Raises: SourceError, naming what is missing."""

    root: Path
    layout: ClassVar[str] = "Kaggle's folder"

    def __post_init__(self) -> None:
        if missing := [name for name in REQUIRED_FILES if not (self.root / name).exists()]:
            missing_files = " and ".join(f"{name} ({REQUIRED_FILES[name]})" for name in missing)
            raise SourceError(
                f"{self.root}: {missing_files} not found: set data.source to the folder with the content of "
                f"Kaggle's zip, which is ILSVRC and the LOC_ files"
            )
        if folders := list_contents(self.root / VAL)[0]:
            raise SourceError(
                f"{self.root / VAL} contains folders ({format_names(folders)}), but Kaggle's has only images: if "
                f"the images were sorted by class, set data.source to {self.root / CLS_LOC}"
            )

    def list_files(self) -> list[tuple[str, int]]:
        """Returns the names and sizes of the images and of the two tables."""
        found = [(name, (self.root / name).stat().st_size) for name in (SOLUTION, MAPPING)]
        for folder, entries in iter_class_folders(self.root / TRAIN):
            found += [(f"{TRAIN}/{folder}/{name}", size) for name, size in entries]
        return found + [(f"{VAL}/{name}", size) for name, size in file_sizes(self.root / VAL)]

    def list_images(self, labels: str) -> Listing:
        """Lists the images. Raises: SourceError, naming what differs from Kaggle's zip."""
        found = ListingBuilder(self.layout)
        for folder, entries in iter_class_folders(self.root / TRAIN):
            for image, size in entries:
                found.add("train", folder, image, f"{TRAIN}/{folder}/{image}", size=size)
        tables = _LabelTables(str(self.root), (self.root / SOLUTION).read_bytes(), (self.root / MAPPING).read_bytes())
        for image, size in file_sizes(self.root / VAL):
            found.add("val", tables.class_of(image), image, f"{VAL}/{image}", size=size)
        return tables.build(found, labels)


@dataclass(frozen=True)
class KaggleZip:
    """Kaggle's zip as downloaded. Raises: SourceError if it has no end, as after an interrupted download."""

    path: Path
    layout: ClassVar[str] = "Kaggle's zip"

    def __post_init__(self) -> None:
        if not zipfile.is_zipfile(self.path):
            raise SourceError(f"{self.path} is truncated, or not a zip: copy or download it again")

    @property
    def root(self) -> Path:
        """Folder that contains the zip."""
        return self.path.parent

    def list_files(self) -> list[tuple[str, int]]:
        """Returns the name and size of the zip."""
        return [(self.path.name, self.path.stat().st_size)]

    def list_images(self, labels: str) -> Listing:
        """Lists the images. Raises: SourceError if the zip is truncated, encrypted or not Kaggle's."""
        found = ListingBuilder(self.layout)
        val_members: list[zipfile.ZipInfo] = []
        tables_by_name: dict[str, zipfile.ZipInfo] = {}

        def add_member(member: zipfile.ZipInfo) -> None:
            folder, _, image = member.filename.rpartition("/")
            if not image or is_system_file(image):
                return
            if folder.startswith(f"{TRAIN}/"):
                found.add("train", folder[len(TRAIN) + 1 :], image, **self._location(member))
            elif folder == VAL:
                val_members.append(member)
            elif image in (SOLUTION, MAPPING):
                tables_by_name[image] = member

        try:
            with _MemberStream(self.path, add_member) as archive:
                if missing := [name for name in (SOLUTION, MAPPING) if name not in tables_by_name]:
                    raise SourceError(
                        f"{self.path} contains no {' and no '.join(missing)}, so it is not Kaggle's: "
                        f"extract it, and set data.source to the folder"
                    )
                tables = _LabelTables(
                    str(self.path), *(archive.read(tables_by_name[name]) for name in (SOLUTION, MAPPING))
                )
        except zipfile.BadZipFile as error:
            raise SourceError(f"{self.path} is truncated or damaged ({error}): copy or download it again") from None
        for member in val_members:
            image = member.filename.rpartition("/")[2]
            found.add("val", tables.class_of(image), image, **self._location(member))
        return tables.build(found, labels)

    def _location(self, member: zipfile.ZipInfo) -> dict[str, Any]:
        if member.flag_bits & _ENCRYPTED or member.compress_type not in _COMPRESSION:
            raise SourceError(
                f"{self.path}: {member.filename} is encrypted, or has a compression method "
                f"other than Kaggle's: extract the zip, and set data.source to the folder"
            )
        return {
            "file": self.path.name,
            "offset": member.header_offset,
            "size": member.file_size,
            "stored_size": member.compress_size,
            "compression": _COMPRESSION[member.compress_type],
        }


class _LabelTables:
    """Kaggle's two tables: the list of classes, and the class of each validation image."""

    def __init__(self, source: str, solution: bytes, mapping: bytes) -> None:
        self._source = source
        try:
            rows = csv.DictReader(io.StringIO(solution.decode()))
            self._class_of = {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
            self._classes = {line.split()[0] for line in mapping.decode().splitlines() if line.strip()}
        except (KeyError, IndexError, AttributeError, UnicodeDecodeError, csv.Error) as error:
            raise SourceError(
                f"{source}: {SOLUTION} or {MAPPING} differs from Kaggle's ({error}): extract or download it again"
            ) from None
        self._found: set[str] = set()

    def class_of(self, image: str) -> str:
        """Returns the class of a validation image, by its file name."""
        name = os.path.splitext(image)[0]
        if name not in self._class_of:
            raise SourceError(f"{self._source}: {VAL}/{image} is not in {SOLUTION}, so its class is unknown: remove it")
        self._found.add(name)
        return self._class_of[name]

    def build(self, found: ListingBuilder, labels: str) -> Listing:
        """Returns the listing after all images were added."""
        if missing := self._class_of.keys() - self._found:
            raise SourceError(
                f"{self._source}: validation images of {SOLUTION} are missing in {VAL}: {format_names(missing)}; "
                f"extract or download the zip again"
            )
        return found.build(labels, self._classes, f"{MAPPING} lists")


class _MemberStream(zipfile.ZipFile):
    """A zip that passes each member to a callback while it reads the central directory, and keeps none of them.

    ZipFile itself would keep all members; the two million of Kaggle's zip take 1.2 GB.
    """

    def __init__(self, path: Path, on_member: Callable[[zipfile.ZipInfo], None]) -> None:
        self._on_member = on_member
        super().__init__(path)

    def __setattr__(self, name: str, value: object) -> None:
        # ZipFile starts with these two empty containers and adds each member to both.
        if name == "filelist":
            value = _MemberSink(self._on_member)
        elif name == "NameToInfo":
            value = _NoIndex()
        super().__setattr__(name, value)


class _MemberSink(list):
    """A list whose `append` calls a callback instead of storing the item. It stays empty."""

    def __init__(self, on_member: Callable[[zipfile.ZipInfo], None]) -> None:
        super().__init__()
        self.append = on_member


class _NoIndex(dict):
    """A dictionary that ignores assignments. It stays empty."""

    def __setitem__(self, name: object, member: object) -> None:
        pass
