"""The process keeps freed memory."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from flopeq.backends.malloc import keep_freed_memory

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
    """Runs code in a new process and returns the numbers that it prints."""
    done = subprocess.run([sys.executable, "-c", PAGE_FAULTS + code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@needs_glibc
def test_importing_the_library_raises_the_trim_threshold(root):
    before, after, larger = counts(
        "import torch; print(page_faults(10, blocks=5))\n"
        "import flopeq; page_faults(10, blocks=5); print(page_faults(10, blocks=5), page_faults(64))",
        root,
    )
    assert before >= 8 * (50 / HUGE - 5)
    assert after <= 8
    assert larger >= 8 * (64 / HUGE - 1)


@needs_glibc
def test_kept_memory_causes_no_new_page_faults(root):
    given_back, kept = counts(
        "from flopeq.backends.malloc import keep_freed_memory\n"
        "print(page_faults(64)); assert keep_freed_memory(); page_faults(64); print(page_faults(64))",
        root,
    )
    assert given_back >= 8 * (64 / HUGE - 1)
    assert kept <= 8


def test_other_c_libraries_are_left_unchanged(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
