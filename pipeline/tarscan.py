"""The samples of a WebDataset tar, found in one pass over its bytes from wherever they come."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, cast

import pyarrow as pa

from pipeline.checksum import checksum
from pipeline.imagenet import WNID
from pipeline.store import ShardError, Store

IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "ppm"})
"""Extensions of images; a sample has one of them."""
SAMPLES = pa.schema([
    ("key", pa.string()),
    ("offset", pa.int64()),  # of the image's first byte in the tar
    ("size", pa.int64()),  # of the image, in bytes
    ("number", pa.int64()),  # of its class, where there is one
    ("name", pa.string()),  # of its class, where there is one: its wnid if that can be found
])
_NAMES = ("wnid", "synset", "class_name", "class")
"""Fields of a sample's `.json` that name its class."""
_WNID = re.compile(rf"(?<![A-Za-z0-9]){WNID.pattern}(?!\d)")


class Scan(NamedTuple):
    """What a pass over a tar found."""

    shard: str
    size: int
    """Bytes of the tar."""
    xxh3: str
    """Checksum of the tar."""
    samples: pa.Table


def scan(store: Store, shard: str) -> Scan:
    """Reads a tar once from its first byte to its last; headers are read by the standard library.

    A sample is a run of files that share their key, which ends at the first dot of a file's name, as webdataset has it.
    Raises: ShardError for a tar that is cut or altered, or a sample without one image and one class.
    """
    pieces = _Pieces(store.stream(shard))
    rows = []
    files: dict[str, Any] = {}
    key = None
    try:
        for member in _members(pieces):
            of, extension = _split(member.name)
            if not member.isreg() or extension not in IMAGES | {"cls", "json"}:
                continue
            if of != key:
                rows += [_row(key, files)] if key is not None else []
                key, files = of, {}
            if extension in files:
                raise _Unfit(f"{key} has two files .{extension}")
            place = member.offset_data, member.size
            files[extension] = place if extension in IMAGES else pieces.read(member.size)
        rows += [_row(key, files)] if key is not None else []
    except tarfile.TarError as error:
        raise ShardError(f"{store.where(shard)} is cut off or altered near byte {pieces.position}: {error}") from None
    except _Unfit as error:
        raise ShardError(f"{store.where(shard)}: {error}") from None
    columns = zip(*rows, strict=True) if rows else [[] for _ in SAMPLES]
    samples = pa.table([pa.array(column, kind.type) for column, kind in zip(columns, SAMPLES, strict=True)], SAMPLES)
    return Scan(shard, pieces.position, pieces.digest.hexdigest(), samples)


class _Unfit(ValueError):
    """A sample that is not an image and its class."""


def _members(pieces: _Pieces) -> Iterator[tarfile.TarInfo]:
    """All members, and then the end, which tarfile itself takes for given where a header is cut or damaged.

    Raises: tarfile.TarError where the members do not end as a tar does: two blocks of zeros, and nothing but zeros.
    """
    with tarfile.TarFile(fileobj=cast(IO[bytes], pieces)) as tar:
        while member := tar.next():
            cast(Any, tar).members.clear()  # it would keep them all
            yield member
        last, end = pieces.last, tar.offset
        if len(last) < tarfile.BLOCKSIZE or last.strip(b"\0") or not pieces.only_zeros_follow():
            raise tarfile.TarError("there is neither a file's header nor the end of a tar")
        if pieces.position < end + 2 * tarfile.BLOCKSIZE:
            raise tarfile.TarError("the end of the tar is not complete")


class _Pieces:
    """Pieces that come one after another, as the file that tarfile reads forwards; all of it enters the checksum."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.digest = checksum()
        self.position = 0
        self.last = b""
        """What was read last."""
        self._pieces = pieces
        self._piece = memoryview(b"")
        self._used = 0

    def tell(self) -> int:
        return self.position

    def read(self, size: int) -> bytes:
        parts = []
        while size and (part := self._take(size)):
            parts.append(part)
            size -= len(part)
        self.last = b"".join(parts)
        return self.last

    def seek(self, position: int) -> int:
        while position > self.position and self._take(position - self.position):
            pass
        return self.position

    def only_zeros_follow(self) -> bool:
        """Reads the rest."""
        zeros = True
        while part := self._take(tarfile.RECORDSIZE):
            zeros = zeros and not bytes(part).strip(b"\0")
        return zeros

    def _take(self, at_most: int) -> memoryview:
        if self._used == len(self._piece):
            content = next(self._pieces, b"")
            self.digest.update(content)
            self._piece, self._used = memoryview(content), 0
        part = self._piece[self._used : self._used + at_most]
        self._used += len(part)
        self.position += len(part)
        return part


def _split(name: str) -> tuple[str, str]:
    """The key, with its folders, and the extension in lower case; no extension for what is no part of a sample."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower() if stem else ""


def _row(key: str, files: dict[str, Any]) -> tuple[str, int, int, int | None, str | None]:
    places = [files[extension] for extension in IMAGES & files.keys()]
    if len(places) != 1:
        raise _Unfit(f"{key} has {len(places) or 'no'} images, among the files .{', .'.join(sorted(files))}")
    try:
        notes = json.loads(files.get("json", b"{}"))
        text = files.get("cls", b"").decode().strip()
    except ValueError as error:
        raise _Unfit(f"{key} has a .cls or .json that cannot be read: {error}") from None
    notes = notes if isinstance(notes, dict) else {}
    number, names = None, [str(notes[field]) for field in _NAMES if notes.get(field)]
    for label in (text, notes.get("label")):
        if label is None or label == "":
            continue
        if not re.fullmatch(r"\d+", str(label)):
            names.append(str(label))
        elif number is None:
            number = int(label)
        elif number != int(label):
            raise _Unfit(f"{key} has the label {number} in its .cls and {label} in its .json")
    wnid = next(filter(None, map(_WNID.search, (*names, str(notes.get("filename", "")), key))), None)
    name = wnid.group() if wnid else names[0] if names else None
    if number is None and name is None:
        raise _Unfit(f"{key} has no class: a .cls, a label in its .json, or a wnid in its name is needed")
    return key, *places[0], number, name
