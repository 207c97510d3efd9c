"""ImageNet's official archives, read in place: class tars inside a tar, a flat tar of validation images, the devkit.

The devkit has the class of each validation image, by an ILSVRC id, and the table from ids to wnids. The ids are in
an order of their own and only lead to the wnid; labels count in the order of the wnids.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pipeline.imagenet import WNID
from pipeline.sources.listing import Collector, Listing, SourceError, some
from pipeline.tarsum import quick_headers

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
NEEDED = {
    TRAIN: "the training images",
    VAL: "the validation images",
    DEVKIT: "the classes of the validation images",
}
VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_META, _TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
_BLOCK = tarfile.BLOCKSIZE
_PADDING = 1 << 20  # bytes: tars end in zeros, up to a multiple of a record that is rarely above 10 KB


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int
    """Of its first byte, in the file that holds the tar."""
    size: int
    """In bytes."""


@dataclass(frozen=True)
class Archives:
    """A folder with the three archives. Raises: SourceError, naming those that are missing."""

    root: Path
    layout: ClassVar[str] = "the official archives"

    def __post_init__(self) -> None:
        if missing := [name for name in NEEDED if not (self.root / name).is_file()]:
            wants = " and ".join(f"{name} ({NEEDED[name]})" for name in missing)
            raise SourceError(f"{self.root}: {wants} not found beside the other archives of ImageNet: put it there, as "
                              f"image-net.org has it, unextracted")

    def files(self) -> list[tuple[str, int]]:
        """Names and sizes of the three archives."""
        return [(name, (self.root / name).stat().st_size) for name in NEEDED]

    def scan(self, labels: str) -> Listing:
        """Lists the images. Raises: SourceError for an archive that is cut or is not ImageNet's."""
        wnid_of, truth = devkit(self.root / DEVKIT)
        found = Collector(self.layout)
        for wnid, images in self._class_tars():
            for image in images:
                found.add("train", wnid, image.name, TRAIN, offset=image.offset, size=image.size)
        self._add_val(found, [wnid_of[number] for number in truth])
        return found.listing(labels, set(wnid_of.values()), f"{DEVKIT} lists as classes")

    def _class_tars(self) -> Iterator[tuple[str, list[Member]]]:
        """The images of each class."""
        path = self.root / TRAIN
        tars = list(members(path))
        for tar in tars:
            if not (tar.name.endswith(".tar") and WNID.fullmatch(tar.name[:-4])):
                raise SourceError(f"{path} holds {tar.name}, but should hold a tar for each class, such as "
                                  f"n01440764.tar: use the archive as image-net.org has it")
        for tar in tars:
            yield tar.name[:-4], list(members(path, tar))

    def _add_val(self, found: Collector, wnids: list[str]) -> None:
        """Takes in the validation images, whose classes are `wnids`, in the order of their numbers."""
        path, num = self.root / VAL, 0
        for image in members(path):
            match = VAL_NAME.fullmatch(image.name)
            if not match or not 0 < int(match[1]) <= len(wnids):
                raise SourceError(f"{path} holds {image.name}, but should hold ILSVRC2012_val_00000001.JPEG to "
                                  f"{len(wnids):08d}, to which {DEVKIT} gives classes")
            found.add("val", wnids[int(match[1]) - 1], image.name, VAL, offset=image.offset, size=image.size)
            num += 1
        if num != len(wnids):
            raise SourceError(f"{path} holds {num:,} images, but {DEVKIT} gives classes to {len(wnids):,}: "
                              f"copy or download them again")


def devkit(path: Path) -> tuple[dict[int, str], list[int]]:
    """The wnid of each ILSVRC id that is a class, and the ids of the validation images in the order of their numbers.

    Raises: SourceError for a devkit that is cut or lacks one of the two.
    """
    import scipy.io

    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                for wanted in (_META, _TRUTH):
                    if member.name.endswith(wanted) and (file := tar.extractfile(member)):
                        files[wanted] = file.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise SourceError(f"{path} cannot be read ({error}): copy or download it again") from None
    for wanted in (_META, _TRUTH):
        if wanted not in files:
            raise SourceError(f"{path} holds no {wanted}: it is cut, or is not the devkit of tasks 1 and 2")
    try:
        table: Any = scipy.io.loadmat(io.BytesIO(files[_META]), squeeze_me=True)["synsets"]
        wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table if int(row["num_children"]) == 0}
        truth = [int(line) for line in files[_TRUTH].split()]
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path}: {_META} or {_TRUTH} is not as in the devkit of tasks 1 and 2 ({error})") from None
    if unknown := set(truth) - wnid_of.keys():
        raise SourceError(f"{path}: {_TRUTH} has the ids {some(map(str, unknown))}, which are no classes in {_META}")
    return wnid_of, truth


def members(path: Path, inner: Member | None = None) -> Iterator[Member]:
    """The files in the tar at `path`, or in a tar that is a member of that one, as their headers say.

    Iterating, the standard library takes a header that is cut, or is none, for the end; here only zeros are one.
    Raises: SourceError if the tar is cut, or goes on after its end.
    """
    with path.open("rb", buffering=0) as file, quick_headers():
        offset = inner.offset if inner else 0
        end = offset + inner.size if inner else file.seek(0, io.SEEK_END)
        whole = f"{path}: {inner.name}" if inner else str(path)
        while header := os.pread(file.fileno(), _BLOCK, offset):
            try:
                member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
                member.offset_data = offset + _BLOCK
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    member = _extended(file, offset)
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # zeros
                break
            except tarfile.TarError as error:
                raise SourceError(f"{whole} is cut or damaged at byte {offset:,} ({error}): {_AGAIN}") from None
            if member.offset_data + member.size > end:
                raise SourceError(f"{whole} is cut, in or after the header of {member.name}: {_AGAIN}")
            offset = member.offset_data + member.size + -member.size % _BLOCK
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise SourceError(f"{whole}: {member.name} is a link or sparse, and no file in the tar")
            yield Member(member.name.rpartition("/")[2], member.offset_data, member.size)
        _check_end(file, offset, end, whole)


def _extended(file: io.FileIO, offset: int) -> tarfile.TarInfo:
    """The member whose name, or more, is in blocks before its own, as tarfile's own iteration gives it.

    Raises: tarfile.TarError if there is none.
    """
    file.seek(offset)
    with tarfile.TarFile(fileobj=file, mode="r") as tar:
        member = tar.next()
    if member is None:
        raise tarfile.ReadError("an extended header without a member")
    return member


def _check_end(file: io.FileIO, offset: int, end: int, whole: str) -> None:
    """Raises: SourceError if what stands from `offset`, where no header is, to `end` is not a tar's end."""
    if end - offset < _BLOCK:
        raise SourceError(f"{whole} is cut, before byte {offset + _BLOCK:,}: it has no end mark; {_AGAIN}")
    file.seek(offset)
    rest = file.read(min(end - offset, _PADDING))
    if any(rest) or offset + len(rest) < end:
        raise SourceError(f"{whole} is damaged at byte {offset:,}, where a header should be: {_AGAIN}")


_AGAIN = "copy or download it again"
