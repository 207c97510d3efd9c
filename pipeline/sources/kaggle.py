"""ImageNet as Kaggle has it, extracted or still in its zip.

Training images lie in a folder for each class, validation images in one for all; `LOC_val_solution.csv` has the
classes of those, and `LOC_synset_mapping.txt` the list of classes. Test images and annotations are passed over.
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

from pipeline.sources.folder import contents, sizes, walk
from pipeline.sources.listing import DEFLATED, STORED, Collector, Listing, SourceError, some

CLS_LOC = "ILSVRC/Data/CLS-LOC"
SOLUTION, MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
TRAIN, VAL = f"{CLS_LOC}/train", f"{CLS_LOC}/val"
NEEDED = {
    TRAIN: "the training images",
    VAL: "the validation images",
    SOLUTION: "the classes of the validation images",
    MAPPING: "the list of classes",
}
_ZIPPED = {zipfile.ZIP_STORED: STORED, zipfile.ZIP_DEFLATED: DEFLATED}
_ENCRYPTED = 1  # bit of a member's flags


@dataclass(frozen=True)
class KaggleFolder:
    """The folder into which Kaggle's zip was extracted. Raises: SourceError, naming what is missing."""

    root: Path
    layout: ClassVar[str] = "Kaggle's folder"

    def __post_init__(self) -> None:
        if missing := [name for name in NEEDED if not (self.root / name).exists()]:
            wants = " and ".join(f"{name} ({NEEDED[name]})" for name in missing)
            raise SourceError(f"{self.root}: {wants} not found: data.source should be the folder that holds what "
                              f"Kaggle's zip does, ILSVRC and the LOC_ files")
        if folders := contents(self.root / VAL)[0]:
            raise SourceError(f"{self.root / VAL} holds folders ({some(folders)}), where Kaggle has images only: if "
                              f"they were sorted by class, let data.source name {self.root / CLS_LOC}")

    def files(self) -> list[tuple[str, int]]:
        """Names and sizes of the images and of the two tables."""
        found = [(name, (self.root / name).stat().st_size) for name in (SOLUTION, MAPPING)]
        for folder, entries in walk(self.root / TRAIN):
            found += [(f"{TRAIN}/{folder}/{name}", size) for name, size in entries]
        return found + [(f"{VAL}/{name}", size) for name, size in sizes(self.root / VAL)]

    def scan(self, labels: str) -> Listing:
        """Lists the images. Raises: SourceError, naming what is not as in Kaggle's zip."""
        found = Collector(self.layout)
        for folder, entries in walk(self.root / TRAIN):
            for image, size in entries:
                found.add("train", folder, image, f"{TRAIN}/{folder}/{image}", size=size)
        tables = _Tables(str(self.root), (self.root / SOLUTION).read_bytes(), (self.root / MAPPING).read_bytes())
        for image, size in sizes(self.root / VAL):
            found.add("val", tables.class_of(image), image, f"{VAL}/{image}", size=size)
        return tables.listing(found, labels)


@dataclass(frozen=True)
class KaggleZip:
    """Kaggle's zip as it was downloaded. Raises: SourceError if it has no end, as a download that was broken off."""

    path: Path
    layout: ClassVar[str] = "Kaggle's zip"

    def __post_init__(self) -> None:
        if not zipfile.is_zipfile(self.path):
            raise SourceError(f"{self.path} is cut, or no zip: copy or download it again")

    @property
    def root(self) -> Path:
        """Folder of the zip."""
        return self.path.parent

    def files(self) -> list[tuple[str, int]]:
        """Name and size of the zip."""
        return [(self.path.name, self.path.stat().st_size)]

    def scan(self, labels: str) -> Listing:
        """Lists the images. Raises: SourceError for a zip that is cut, encrypted or not Kaggle's."""
        found = Collector(self.layout)
        val: list[zipfile.ZipInfo] = []
        of_name: dict[str, zipfile.ZipInfo] = {}

        def take(member: zipfile.ZipInfo) -> None:
            folder, _, image = member.filename.rpartition("/")
            if not image:
                return
            if folder.startswith(f"{TRAIN}/"):
                found.add("train", folder[len(TRAIN) + 1 :], image, **self._place(member))
            elif folder == VAL:
                val.append(member)
            elif image in (SOLUTION, MAPPING):
                of_name[image] = member

        try:
            with _Directory(self.path, take) as archive:
                if missing := [name for name in (SOLUTION, MAPPING) if name not in of_name]:
                    raise SourceError(f"{self.path} holds no {' and no '.join(missing)}, so it is not Kaggle's: "
                                      f"extract it, and let data.source name the folder")
                tables = _Tables(str(self.path), archive.read(of_name[SOLUTION]), archive.read(of_name[MAPPING]))
        except zipfile.BadZipFile as error:
            raise SourceError(f"{self.path} is cut or damaged ({error}): copy or download it again") from None
        for member in val:
            image = member.filename.rpartition("/")[2]
            found.add("val", tables.class_of(image), image, **self._place(member))
        return tables.listing(found, labels)

    def _place(self, member: zipfile.ZipInfo) -> dict[str, Any]:
        if member.flag_bits & _ENCRYPTED or member.compress_type not in _ZIPPED:
            raise SourceError(f"{self.path}: {member.filename} is encrypted, or packed by a method that is not "
                              f"Kaggle's: extract the zip, and let data.source name the folder")
        return {"file": self.path.name, "offset": member.header_offset, "size": member.file_size,
                "packed": member.compress_size, "zipped": _ZIPPED[member.compress_type]}


class _Tables:
    """Kaggle's two tables: the classes, and which of them each validation image has."""

    def __init__(self, where: str, solution: bytes, mapping: bytes) -> None:
        self._where = where
        try:
            rows = csv.DictReader(io.StringIO(solution.decode()))
            self._class_of = {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
            self._classes = {line.split()[0] for line in mapping.decode().splitlines() if line.strip()}
        except (KeyError, IndexError, AttributeError, UnicodeDecodeError, csv.Error) as error:
            raise SourceError(f"{where}: {SOLUTION} or {MAPPING} is not as Kaggle has it ({error}): extract or "
                              f"download it again") from None
        self._seen: set[str] = set()

    def class_of(self, image: str) -> str:
        """The class of a validation image, by its file's name."""
        name = os.path.splitext(image)[0]
        if name not in self._class_of:
            raise SourceError(f"{self._where}: {VAL}/{image} is not in {SOLUTION}, so its class is unknown: remove it")
        self._seen.add(name)
        return self._class_of[name]

    def listing(self, found: Collector, labels: str) -> Listing:
        """The listing, once all images are in."""
        if missing := self._class_of.keys() - self._seen:
            raise SourceError(f"{self._where}: validation images of {SOLUTION} are missing in {VAL}: {some(missing)}; "
                              f"extract or download the zip again")
        return found.listing(labels, self._classes, f"{MAPPING} lists")


class _Directory(zipfile.ZipFile):
    """A zip that hands its members on while it reads their list: kept, the two million of Kaggle's take 1.2 GB."""

    def __init__(self, path: Path, take: Callable[[zipfile.ZipInfo], None]) -> None:
        self._take = take
        super().__init__(path)

    def __setattr__(self, name: str, value: object) -> None:
        # ZipFile puts each member into these two, both empty at first.
        if name == "filelist":
            value = _HandingOn(self._take)
        elif name == "NameToInfo":
            value = _Forgetting()
        super().__setattr__(name, value)


class _HandingOn(list):
    def __init__(self, take: Callable[[zipfile.ZipInfo], None]) -> None:
        super().__init__()
        self.append = take


class _Forgetting(dict):
    def __setitem__(self, name: object, member: object) -> None:
        pass
