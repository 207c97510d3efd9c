"""Settings that make the process keep freed memory on a CPU, for layers to reuse.

glibc returns freed memory to the system: large blocks at once, and the rest as soon as the free memory exceeds twice
the largest block returned so far (mallopt(3)). The system clears every page before it hands it out again. Halves are
smaller blocks than whole features and there are more of them, so E pays this cost far more often than X
(docs/performance.md has the times).
"""

from __future__ import annotations

import ctypes
import platform

import torch

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # constants of malloc.h

_NEVER = -1

_MAX_LEARNED_BYTES = (32 << 20) - 8192
"""Bytes of the largest freed block by which glibc raises its thresholds."""


def raise_trim_threshold() -> None:
    """Raises glibc's thresholds to their dynamic maximum: glibc keeps up to 64 MiB, and blocks of up to 32 MiB.

    The function allocates and frees an array of the largest size that raises them, and writes nothing to it. It runs
    when flopeq is imported.
    """
    torch.empty(_MAX_LEARNED_BYTES, dtype=torch.uint8, device="cpu")  # whatever the default device is


def keep_freed_memory() -> bool:
    """Makes this process keep all memory that it frees. Call it once, before a network runs on a CPU in large batches.

    The process then never shrinks. The environment variables `MALLOC_TRIM_THRESHOLD_=-1 MALLOC_MMAP_MAX_=0` have the
    same effect. Returns whether the setting took effect. It does with glibc, the C library of most Linux systems.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _NEVER))
