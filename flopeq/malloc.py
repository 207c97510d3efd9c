"""Memory that layers free and ask for again, on a CPU, kept by the process in between.

glibc gives freed memory back to the system: large blocks at once, the rest as soon as more lies free than twice the
largest block it has given back (mallopt(3)). The system clears every page again before it hands it out. Halves are
smaller blocks than whole features, and more of them, so that E pays for this far more often than X
(docs/performance.md has the times).
"""

from __future__ import annotations

import ctypes
import platform

import torch

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # their numbers in malloc.h
_NEVER = -1
_LARGEST = (32 << 20) - 8192
"""Bytes of the largest block that glibc learns from."""


def expect_large_blocks() -> None:
    """Shows malloc a block as large as it learns from: glibc then keeps up to 64 MiB, and blocks of up to 32 MiB.

    As if the process had freed an array of that size; nothing is written to it. Called when flopeq is imported.
    """
    torch.empty(_LARGEST, dtype=torch.uint8, device="cpu")  # whatever the default device is


def keep_freed_memory() -> bool:
    """Has this process keep all memory that it frees; call it once, before a network runs on a CPU in large batches.

    The process then stays as large as it ever was. `MALLOC_TRIM_THRESHOLD_=-1 MALLOC_MMAP_MAX_=0` in its environment
    do the same. Returns whether the C library could be told: glibc can, which is that of most Linux systems.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _NEVER))
