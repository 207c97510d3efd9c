"""Gathers images from wherever they lie in a source into a tar, at the speed of the disk.

The images are read straight to their places in a buffer that is laid out as the tar will be, and a second thread
hashes and writes each full buffer while the next is filled. Buffers are small enough to stay in the processor's
cache. What is read next is asked of the disk ahead, in the order in which it lies there; when what was written goes to
the disk is left to the system.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tarfile
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.checksum import checksum
from pipeline.sources import DEFLATED, PLAIN, SourceError

_BUFFER = 1 << 20  # bytes; 4 MiB takes 1.4x as long
_BUFFERS = 3  # one is filled, one written, one on its way
_AHEAD = 64 << 20  # bytes that are asked for ahead of what is being read, at most twice
_PROBES = 32  # places that tell whether the others are in memory already
_THREADS = 8  # that ask: on a network each opening of a file takes its time
_ZIP_HEADER = struct.Struct(zipfile.structFileHeader)  # type: ignore[attr-defined]  # ends with two lengths
_PADDING = bytes(tarfile.RECORDSIZE)


class Place(NamedTuple):
    """Where the bytes of an image lie: the columns of pipeline.sources.IMAGES."""

    file: str
    offset: int
    size: int
    packed: int
    zipped: int


class Reader:
    """Reads images from the files of a source; `with` closes what is open."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._file, self._descriptor = "", -1
        self._threads = ThreadPoolExecutor(_THREADS)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._close()

    def ahead(self, places: Sequence[Place]) -> Iterator[Place]:
        """The places in their order, while what comes next is already on its way from the disk."""
        parts = list(_parts(places))
        for number, part in enumerate(parts):
            if number == 0:
                self._ask(part)
            if number + 1 < len(parts):
                self._ask(parts[number + 1])
            yield from part

    def read(self, place: Place, into: memoryview) -> None:
        """Reads an image, `place.size` bytes. Raises: SourceError naming a file that is not as it was listed."""
        try:
            if place.file != self._file:
                self._close()
                self._descriptor, self._file = os.open(self.root / place.file, os.O_RDONLY), place.file
            if place.zipped == PLAIN:
                self._fill(into, place.offset)
            else:
                self._unzip(place, into)
        except OSError as error:
            raise SourceError(f"{self.root / place.file} cannot be read: {error.strerror}") from None

    def _unzip(self, place: Place, into: memoryview) -> None:
        header = bytearray(_ZIP_HEADER.size)
        self._fill(memoryview(header), place.offset)
        signature, *_, name, extra = _ZIP_HEADER.unpack(header)
        if signature != zipfile.stringFileHeader:  # type: ignore[attr-defined]
            raise SourceError(f"{self.root / place.file} is damaged: no member of the zip at byte {place.offset}")
        start = place.offset + _ZIP_HEADER.size + name + extra
        if place.zipped != DEFLATED:
            self._fill(into, start)
            return
        packed = bytearray(place.packed)
        self._fill(memoryview(packed), start)
        try:
            into[:] = zlib.decompress(packed, -zlib.MAX_WBITS, place.size)
        except (zlib.error, ValueError):
            raise SourceError(f"{self.root / place.file} is damaged: the member at byte {place.offset} of the zip "
                              f"does not decompress to {place.size} bytes") from None

    def _fill(self, into: memoryview, offset: int) -> None:
        done = 0
        while done < len(into):
            count = os.preadv(self._descriptor, [into[done:]], offset + done)
            if not count:
                raise SourceError(f"{self.root / self._file} is shorter than when it was listed: it ends at byte "
                                  f"{offset + done}, within an image")
            done += count

    def _ask(self, places: Sequence[Place]) -> None:
        """Asks for the bytes in the order in which they lie on the disk, and does not wait for them."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        sorted_places = sorted(places)
        step = -(-len(sorted_places) // _THREADS)
        files = {place.file for place in places}
        if len(files) == 1:
            with contextlib.suppress(OSError):  # reading will tell
                _will_need(self.root / files.pop(), sorted_places)
            return
        for start in range(0, len(sorted_places), step):
            self._threads.submit(_will_need_files, self.root, sorted_places[start : start + step])

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Tar:
    """A USTAR file that a second thread writes and hashes: `with Tar(path) as tar`, `add` members, `finish`.

    Headers are tarfile's, with uid, gid and mtime 0.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._digest = checksum()
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future[bytearray]] = deque()
        self._header = tarfile.TarInfo()
        self._buffer = bytearray(_BUFFER)
        self._used = self._flushed = 0

    def __enter__(self) -> Tar:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        os.close(self._descriptor)

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._flushed + self._used

    def room(self, size: int) -> memoryview:
        """Where the next member's content, of so many bytes, belongs: what is there need not be moved by `add`."""
        needed = size + 2 * tarfile.BLOCKSIZE  # its header, and the padding after it
        if self._used + needed > len(self._buffer):
            self._flush(needed)
        start = self._used + tarfile.BLOCKSIZE
        return memoryview(self._buffer)[start : start + size]

    def add(self, name: str, content: bytes | memoryview) -> int:
        """Appends a member, whose content may be what `room` gave; the place of its first byte in the tar.

        Raises: ValueError for a name too long for USTAR.
        """
        size = len(content)
        self._header.name, self._header.size = name, size
        header = self._header.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
        if not isinstance(content, memoryview):
            self.room(size)[:] = content
        start = self._used + tarfile.BLOCKSIZE
        end = start + size
        self._buffer[self._used : start] = header
        self._used = end + -size % tarfile.BLOCKSIZE
        self._buffer[end : self._used] = _PADDING[: self._used - end]
        return self._flushed + start

    def finish(self) -> str:
        """Ends the tar as tarfile does, with two empty blocks and padding; its checksum, once all is written."""
        end = 2 * tarfile.BLOCKSIZE
        end += -(self.size + end) % tarfile.RECORDSIZE
        self._flush(end)
        self._buffer[:end] = bytes(end)
        self._used = end
        self._flush(0)
        while self._pending:
            self._pending.popleft().result()
        return self._digest.hexdigest()

    def _flush(self, needed: int) -> None:
        """Hands the buffer to the second thread, and takes one with so much room."""
        self._pending.append(self._thread.submit(self._write, self._buffer, self._used))
        self._flushed += self._used
        self._used = 0
        self._buffer = self._pending.popleft().result() if len(self._pending) == _BUFFERS else bytearray(_BUFFER)
        if len(self._buffer) < needed:
            self._buffer = bytearray(needed)

    def _write(self, buffer: bytearray, used: int) -> bytearray:
        left = memoryview(buffer)[:used]
        self._digest.update(left)
        while len(left):
            left = left[os.write(self._descriptor, left) :]
        return buffer


def tar_size(sizes: np.ndarray) -> int:
    """Bytes of a tar of members of these sizes."""
    blocks = len(sizes) + int((-(-sizes // tarfile.BLOCKSIZE)).sum()) + 2
    return -(-blocks * tarfile.BLOCKSIZE // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _parts(places: Sequence[Place]) -> Iterator[Sequence[Place]]:
    start = num_bytes = 0
    for number, place in enumerate(places):
        num_bytes += place.packed
        if num_bytes > _AHEAD:
            yield places[start : number + 1]
            start, num_bytes = number + 1, 0
    if start < len(places):
        yield places[start:]


def _will_need(path: Path, places: Sequence[Place]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if _in_memory(descriptor, places[:: -(-len(places) // _PROBES)]):
            return  # asking for all of it would take a tenth of the time of reading it
        for place in places:
            os.posix_fadvise(descriptor, place.offset, place.packed, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)


def _in_memory(descriptor: int, places: Sequence[Place]) -> bool:
    """Whether these places can be had without the disk, by their middles: listing them has read what lies between."""
    middles = (place.offset + place.packed // 2 for place in places)
    try:
        return all(os.preadv(descriptor, [bytearray(1)], middle, os.RWF_NOWAIT) for middle in middles)
    except OSError:  # they cannot, or this system does not say
        return False


def _will_need_files(root: Path, places: Sequence[Place]) -> None:
    for place in places:
        _will_need(root / place.file, [place])
