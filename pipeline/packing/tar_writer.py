"""Writes a tar of many small files in large blocks."""

from __future__ import annotations

import os
import tarfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pipeline.base.files import new_checksum

_BUFFER_BYTES = 1 << 20  # with 4 MiB, writing takes 1.4x as long

_NUM_BUFFERS = 3  # one is being filled, one is being written, one waits

_ZEROS = bytes(tarfile.RECORDSIZE)


class TarWriter:
    """A USTAR file that a second thread hashes and writes.

    Use it as `with TarWriter(path) as tar`, call `add` for each member, and `finish` at the end. The headers are those
    of tarfile, with uid, gid and mtime 0.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._digest = new_checksum()
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future[bytearray]] = deque()
        self._header = tarfile.TarInfo()
        self._buffer = bytearray(_BUFFER_BYTES)
        self._used = self._flushed = 0

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        os.close(self._descriptor)

    @property
    def size(self) -> int:
        """Size of the tar so far, in bytes."""
        return self._flushed + self._used

    def reserve(self, size: int) -> memoryview:
        """Returns the buffer for the content of the next member. `add` does not copy content that is already there."""
        needed = size + 2 * tarfile.BLOCKSIZE  # its header, and the padding after it
        if self._used + needed > len(self._buffer):
            self._flush(needed)
        start = self._used + tarfile.BLOCKSIZE
        return memoryview(self._buffer)[start : start + size]

    def add(self, name: str, content: bytes | memoryview) -> int:
        """Appends a member. `content` may be the buffer from `reserve`.

        Returns: the offset of the first byte of the content in the tar.
        Raises: ValueError if the name is too long for USTAR.
        """
        size = len(content)
        self._header.name, self._header.size = name, size
        header = self._header.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
        if not isinstance(content, memoryview):
            self.reserve(size)[:] = content
        start = self._used + tarfile.BLOCKSIZE
        end = start + size
        self._buffer[self._used : start] = header
        self._used = end + -size % tarfile.BLOCKSIZE
        self._buffer[end : self._used] = _ZEROS[: self._used - end]
        return self._flushed + start

    def finish(self) -> str:
        """Ends the tar with two empty blocks and padding, as tarfile does, and waits until everything is written.

        Returns: the checksum of the tar.
        """
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
        """Passes the buffer to the second thread and takes another one of at least `needed` bytes."""
        self._pending.append(self._thread.submit(self._write, self._buffer, self._used))
        self._flushed += self._used
        self._used = 0
        self._buffer = (
            self._pending.popleft().result() if len(self._pending) == _NUM_BUFFERS else bytearray(_BUFFER_BYTES)
        )
        if len(self._buffer) < needed:
            self._buffer = bytearray(needed)

    def _write(self, buffer: bytearray, used: int) -> bytearray:
        remaining = memoryview(buffer)[:used]
        self._digest.update(remaining)
        while len(remaining):
            remaining = remaining[os.write(self._descriptor, remaining) :]
        return buffer


def tar_size(sizes: np.ndarray) -> int:
    """Returns the size in bytes of a tar with members of the given sizes."""
    blocks = len(sizes) + int((-(-sizes // tarfile.BLOCKSIZE)).sum()) + 2
    return -(-blocks * tarfile.BLOCKSIZE // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
