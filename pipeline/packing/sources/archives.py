"""ImageNet's official archives, read in place: class tars inside a tar, a flat tar of validation images, the devkit.

The devkit has the class of each validation image as an ILSVRC id, and a table that maps ids to wnids. The ids have an
order of their own and are only used to find the wnid. Labels follow the order of the wnids.
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

from pipeline.base.errors import SourceError
from pipeline.base.imagenet import WNID_PATTERN
from pipeline.base.images import is_system_file
from pipeline.packing.sources.listing import Listing, ListingBuilder, format_names

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"

REQUIRED_FILES = {
    TRAIN: "the training images",
    VAL: "the validation images",
    DEVKIT: "the classes of the validation images",
}

VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")

_META, _VAL_LABELS = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"

_BLOCK = tarfile.BLOCKSIZE

_REDOWNLOAD_HINT = "copy or download it again"

_PADDING = 1 << 20  # bytes; a tar ends in zeros up to a multiple of a record, which is rarely above 10 KB


class TarMember(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int
    """Position of its first byte in the file that contains the tar."""
    size: int
    """Size in bytes."""


@dataclass(frozen=True)
class Archives:
    """A folder with the three archives. Raises: SourceError, naming the missing ones."""

    root: Path
    layout: ClassVar[str] = "the official archives"

    def __post_init__(self) -> None:
        if missing := [name for name in REQUIRED_FILES if not (self.root / name).is_file()]:
            missing_files = " and ".join(f"{name} ({REQUIRED_FILES[name]})" for name in missing)
            raise SourceError(
                f"{self.root}: {missing_files} not found beside the other archives of ImageNet: put the file there as "
                f"downloaded from image-net.org, without extracting it"
            )

    def list_files(self) -> list[tuple[str, int]]:
        """Returns the names and sizes of the three archives."""
        return [(name, (self.root / name).stat().st_size) for name in REQUIRED_FILES]

    def list_images(self, labels: str) -> Listing:
        """Lists the images. Raises: SourceError if an archive is truncated or is not ImageNet's."""
        wnid_of, val_ids = read_devkit(self.root / DEVKIT)
        builder = ListingBuilder(self.layout)
        for wnid, images in self._iter_class_tars():
            for image in images:
                builder.add("train", wnid, image.name, TRAIN, offset=image.offset, size=image.size)
        self._add_val_images(builder, [wnid_of[number] for number in val_ids])
        return builder.build(labels, set(wnid_of.values()), f"{DEVKIT} lists as classes")

    def _iter_class_tars(self) -> Iterator[tuple[str, list[TarMember]]]:
        """Yields the wnid and the images of each class."""
        path = self.root / TRAIN
        tars = list(iter_tar_members(path))
        for tar in tars:
            if not (tar.name.endswith(".tar") and WNID_PATTERN.fullmatch(tar.name[:-4])):
                raise SourceError(
                    f"{path} contains {tar.name}, but should contain one tar per class, such as "
                    f"n01440764.tar: use the archive as downloaded from image-net.org"
                )
        for tar in tars:
            yield tar.name[:-4], list(iter_tar_members(path, tar))

    def _add_val_images(self, builder: ListingBuilder, wnids: list[str]) -> None:
        """Adds the validation images. `wnids` are their classes in the order of their numbers."""
        path, num = self.root / VAL, 0
        for image in iter_tar_members(path):
            match = VAL_NAME.fullmatch(image.name)
            if not match or not 0 < int(match[1]) <= len(wnids):
                raise SourceError(
                    f"{path} contains {image.name}, but should contain ILSVRC2012_val_00000001.JPEG to "
                    f"{len(wnids):08d}, which have classes in {DEVKIT}"
                )
            builder.add("val", wnids[int(match[1]) - 1], image.name, VAL, offset=image.offset, size=image.size)
            num += 1
        if num != len(wnids):
            raise SourceError(
                f"{path} contains {num:,} images, but {DEVKIT} has classes for {len(wnids):,}: "
                f"copy or download both again"
            )


def read_devkit(path: Path) -> tuple[dict[int, str], list[int]]:
    """Returns the wnid of each ILSVRC id that is a class, and the ids of the validation images in order.

    Raises: SourceError if the devkit is truncated or lacks one of the two.
    """
    import scipy.io

    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                for file_name in (_META, _VAL_LABELS):
                    if member.name.endswith(file_name) and (file := tar.extractfile(member)):
                        files[file_name] = file.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise SourceError(f"{path} cannot be read ({error}): copy or download it again") from None
    for file_name in (_META, _VAL_LABELS):
        if file_name not in files:
            raise SourceError(f"{path} contains no {file_name}: it is truncated, or is not the devkit of tasks 1 and 2")
    try:
        table: Any = scipy.io.loadmat(io.BytesIO(files[_META]), squeeze_me=True)["synsets"]
        wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table if int(row["num_children"]) == 0}
        val_ids = [int(line) for line in files[_VAL_LABELS].split()]
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"{path}: {_META} or {_VAL_LABELS} differs from the devkit of tasks 1 and 2 ({error}): download it again"
        ) from None
    if unknown := set(val_ids) - wnid_of.keys():
        raise SourceError(
            f"{path}: {_VAL_LABELS} has the ids {format_names(map(str, unknown))}, not classes in {_META}"
        )
    return wnid_of, val_ids


def iter_tar_members(path: Path, inner: TarMember | None = None) -> Iterator[TarMember]:
    """Yields the files in the tar at `path`, or in a tar that is a member of it, from their headers.

    tarfile takes a truncated or invalid header for the end of the tar. Here only zeros mark the end.
    Raises: SourceError if the tar is truncated or continues after its end.
    """
    with path.open("rb", buffering=0) as file:
        offset = inner.offset if inner else 0
        end = offset + inner.size if inner else file.seek(0, io.SEEK_END)
        tar_name = f"{path}: {inner.name}" if inner else str(path)
        while header := os.pread(file.fileno(), _BLOCK, offset):
            try:
                member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
                member.offset_data = offset + _BLOCK
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    member = _read_extended_header(file, offset)
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # zeros
                break
            except tarfile.TarError as error:
                raise SourceError(
                    f"{tar_name} is truncated or damaged at byte {offset:,} ({error}): {_REDOWNLOAD_HINT}"
                ) from None
            if member.offset_data + member.size > end:
                raise SourceError(
                    f"{tar_name} is truncated, in or after the header of {member.name}: {_REDOWNLOAD_HINT}"
                )
            offset = member.offset_data + member.size + -member.size % _BLOCK
            name = member.name.rpartition("/")[2]
            if member.isdir() or is_system_file(name):
                continue
            if not member.isreg() or member.issparse():
                raise SourceError(f"{tar_name}: {member.name} is a link or a sparse file: {_REDOWNLOAD_HINT}")
            yield TarMember(name, member.offset_data, member.size)
        _check_end(file, offset, end, tar_name)


def _read_extended_header(file: io.FileIO, offset: int) -> tarfile.TarInfo:
    """Reads a member with an extended header, such as a long name, with tarfile.

    Raises: tarfile.TarError if no member follows the extended header.
    """
    file.seek(offset)
    with tarfile.TarFile(fileobj=file, mode="r") as tar:
        member = tar.next()
    if member is None:
        raise tarfile.ReadError("an extended header without a member")
    return member


def _check_end(file: io.FileIO, offset: int, end: int, tar_name: str) -> None:
    """Raises SourceError unless the bytes from `offset` to `end` are the end of a tar."""
    if end - offset < _BLOCK:
        raise SourceError(
            f"{tar_name} is truncated before byte {offset + _BLOCK:,}: it has no end mark; {_REDOWNLOAD_HINT}"
        )
    file.seek(offset)
    rest = file.read(min(end - offset, _PADDING))
    if any(rest) or offset + len(rest) < end:
        raise SourceError(f"{tar_name} is damaged at byte {offset:,}, where a header is expected: {_REDOWNLOAD_HINT}")
