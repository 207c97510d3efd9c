"""A bounded number of open files, so that a process can read from any number of shards."""

from __future__ import annotations

import contextlib
import os
import resource
from collections import OrderedDict
from pathlib import Path

MAX_OPEN_FILES = 4096
"""More than ImageNet has shards, so that each is opened once."""

_RESERVED = 512  # for everything else that the process opens


class OpenFiles:
    """File descriptors of the files that were read last. The one that was not read for longest is closed first.

    It raises the open file limit of the process, commonly 1,024, where it may, and otherwise keeps fewer files open.
    Not for several threads at once.
    """

    def __init__(self, num_files: int) -> None:
        """Args: num_files: how many different files there are."""
        self.limit = _raise_open_file_limit(min(num_files, MAX_OPEN_FILES))
        self._descriptors: OrderedDict[Path, int] = OrderedDict()

    def __del__(self) -> None:
        for descriptor in self.__dict__.pop("_descriptors", {}).values():
            os.close(descriptor)

    def __len__(self) -> int:
        return len(self._descriptors)

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Returns up to `size` bytes from `offset` on. Raises: OSError if the file cannot be opened or read."""
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            descriptor = self._descriptors[path] = os.open(path, os.O_RDONLY)
            if len(self._descriptors) > self.limit:
                os.close(self._descriptors.popitem(last=False)[1])
        else:
            self._descriptors.move_to_end(path)
        return os.pread(descriptor, size, offset)


def _raise_open_file_limit(number: int) -> int:
    """Returns how many of so many files this process may keep open, after raising its limit as far as needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < number + _RESERVED:
        soft = min(number + _RESERVED, hard)
        with contextlib.suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(number, soft - _RESERVED))
