"""Memory that is freed and asked for again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from flopeq.malloc import keep_freed_memory

PAGE_FAULTS = """
import resource

def page_faults(mib, blocks=1):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        [b"x" * (mib << 20) for _ in range(blocks)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""
HUGE = 2
"""MiB of the largest page that the system may hand out at once."""

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


def counts(code: str, root) -> list[int]:
    """What a process prints that runs this code."""
    done = subprocess.run([sys.executable, "-c", PAGE_FAULTS + code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@needs_glibc
def test_importing_the_library_keeps_blocks_as_large_as_malloc_learns_from(root):
    before, after, larger = counts(
        "import torch; print(page_faults(10, blocks=5))\n"
        "import flopeq; page_faults(10, blocks=5); print(page_faults(10, blocks=5), page_faults(64))",
        root,
    )
    assert before >= 8 * (50 / HUGE - 5)
    assert after <= 8
    assert larger >= 8 * (64 / HUGE - 1)


@needs_glibc
def test_memory_that_is_kept_is_not_cleared_again_by_the_system(root):
    given_back, kept = counts(
        "from flopeq.malloc import keep_freed_memory\n"
        "print(page_faults(64)); assert keep_freed_memory(); page_faults(64); print(page_faults(64))",
        root,
    )
    assert given_back >= 8 * (64 / HUGE - 1)
    assert kept <= 8


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
