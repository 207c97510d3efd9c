"""Reads images from the files of a source, at the speed of the disk.

Images are read directly into a buffer of the `TarWriter`, whose layout is that of the tar. A second thread hashes and
writes each full buffer while the next one is filled. The buffers are small enough to stay in the processor's cache. The
reader prefetches the next images in the order of their position on disk. The system decides when written data goes to
the disk.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.base.errors import SourceError
from pipeline.packing.sources import idx
from pipeline.packing.sources.listing import DEFLATED, GREY_PIXELS, NOT_ZIPPED

_PREFETCH_BYTES = 64 << 20  # size of a prefetch window; at most two windows are in flight

_NUM_PROBES = 32  # images that are probed to decide whether a file is already in the page cache

_PREFETCH_THREADS = 8  # on a network file system, opening a file takes time

_ZIP_HEADER = struct.Struct(zipfile.structFileHeader)  # type: ignore[attr-defined]  # ends with two lengths


class ImageLocation(NamedTuple):
    """Position of the bytes of an image: columns of packing.sources.listing.IMAGES_SCHEMA."""

    file: str
    offset: int
    size: int
    stored_size: int
    compression: int


class ImageReader:
    """Reads images from the files of a source. A context manager that closes the open file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._file, self._descriptor = "", -1
        self._pixels_of: dict[str, np.ndarray] = {}  # of IDX files, by name
        self._threads = ThreadPoolExecutor(_PREFETCH_THREADS)

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._close()

    def prefetch(self, locations: Sequence[ImageLocation]) -> Iterator[ImageLocation]:
        """Yields the locations in order and prefetches the images that follow."""
        windows = list(_prefetch_windows(locations))
        for number, window in enumerate(windows):
            if number == 0:
                self._advise_prefetch(window)
            if number + 1 < len(windows):
                self._advise_prefetch(windows[number + 1])
            yield from window

    def read(self, location: ImageLocation, buffer: memoryview) -> None:
        """Reads an image of `location.size` bytes into `buffer`.

        Raises: SourceError, naming the file, if the file is damaged or has changed since it was listed.
        """
        if location.compression == GREY_PIXELS:
            self._read_pixels(location, buffer)
            return
        try:
            if location.file != self._file:
                self._close()
                self._descriptor, self._file = os.open(self.root / location.file, os.O_RDONLY), location.file
            if location.compression == NOT_ZIPPED:
                self._read_exactly(buffer, location.offset)
            else:
                self._read_zip_member(location, buffer)
        except OSError as error:
            raise SourceError(f"{self.root / location.file} cannot be read: {error.strerror}") from None

    def _read_pixels(self, location: ImageLocation, buffer: memoryview) -> None:
        if location.file not in self._pixels_of:
            self._pixels_of[location.file] = idx.read_idx(self.root / location.file, "images")
        images_NHW = self._pixels_of[location.file]
        _, height, width = images_NHW.shape
        pgm = idx.pgm_header(height, width)
        pgm += images_NHW.reshape(-1)[location.offset : location.offset + height * width].tobytes()
        if len(pgm) != location.size or location.stored_size != height * width:
            raise SourceError(f"{self.root / location.file} has changed since it was listed")
        buffer[:] = pgm

    def _read_zip_member(self, location: ImageLocation, buffer: memoryview) -> None:
        header = bytearray(_ZIP_HEADER.size)
        self._read_exactly(memoryview(header), location.offset)
        signature, *_, name, extra = _ZIP_HEADER.unpack(header)
        if signature != zipfile.stringFileHeader:  # type: ignore[attr-defined]
            raise SourceError(f"{self.root / location.file} is damaged: no member of the zip at byte {location.offset}")
        start = location.offset + _ZIP_HEADER.size + name + extra
        if location.compression != DEFLATED:
            self._read_exactly(buffer, start)
            return
        deflated = bytearray(location.stored_size)
        self._read_exactly(memoryview(deflated), start)
        try:
            buffer[:] = zlib.decompress(deflated, -zlib.MAX_WBITS, location.size)
        except (zlib.error, ValueError):
            raise SourceError(
                f"{self.root / location.file} is damaged: the member at byte {location.offset} of the zip "
                f"does not decompress to {location.size} bytes"
            ) from None

    def _read_exactly(self, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            if not count:
                raise SourceError(
                    f"{self.root / self._file} is shorter than when it was listed: it ends at byte "
                    f"{offset + done}, within an image"
                )
            done += count

    def _advise_prefetch(self, locations: Sequence[ImageLocation]) -> None:
        """Asks the system to read the images ahead, in the order of their position on disk. Does not wait."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        sorted_locations = sorted(location for location in locations if location.compression != GREY_PIXELS)
        if not sorted_locations:
            return
        step = -(-len(sorted_locations) // _PREFETCH_THREADS)
        files = {location.file for location in locations}
        if len(files) == 1:
            with contextlib.suppress(OSError):  # the read that follows reports the error
                _prefetch_file(self.root / files.pop(), sorted_locations)
            return
        for start in range(0, len(sorted_locations), step):
            self._threads.submit(_prefetch_files, self.root, sorted_locations[start : start + step])

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _prefetch_windows(locations: Sequence[ImageLocation]) -> Iterator[Sequence[ImageLocation]]:
    start = num_bytes = 0
    for number, location in enumerate(locations):
        num_bytes += location.stored_size
        if num_bytes > _PREFETCH_BYTES:
            yield locations[start : number + 1]
            start, num_bytes = number + 1, 0
    if start < len(locations):
        yield locations[start:]


def _prefetch_file(path: Path, locations: Sequence[ImageLocation]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if _is_cached(descriptor, locations[:: -(-len(locations) // _NUM_PROBES)]):
            return  # prefetching cached data would take a tenth of the time of reading it
        for location in locations:
            os.posix_fadvise(descriptor, location.offset, location.stored_size, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)


def _is_cached(descriptor: int, locations: Sequence[ImageLocation]) -> bool:
    """Whether the images are in the page cache. Probes their middles: listing reads what lies between."""
    middles = (location.offset + location.stored_size // 2 for location in locations)
    try:
        return all(os.preadv(descriptor, [bytearray(1)], middle, os.RWF_NOWAIT) for middle in middles)
    except OSError:  # not cached, or the system does not support the query
        return False


def _prefetch_files(root: Path, locations: Sequence[ImageLocation]) -> None:
    for location in locations:
        _prefetch_file(root / location.file, [location])
