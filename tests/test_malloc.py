"""Memory that is freed and asked for again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from flopeq.malloc import keep_freed_memory

PAGE_FAULTS = """
import resource
from flopeq.malloc import keep_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        b"x" * 2**26
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = page_faults()
assert keep_freed_memory()
page_faults()
print(given_back, page_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_that_is_kept_is_not_cleared_again_by_the_system(root):
    done = subprocess.run([sys.executable, "-c", PAGE_FAULTS], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    given_back, kept = map(int, done.stdout.split())
    assert given_back >= 8 * 31  # blocks of 64 MiB in pages of 2 MiB at most
    assert kept <= 8


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
