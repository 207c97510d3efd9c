"""benchmarks/views.py: a small run of it makes its table."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_benchmark_makes_a_markdown_table(root):
    words = "--model resnet10t --image-size 32 --views 1 2 --runs 2 --markdown"
    command = [sys.executable, "-m", "benchmarks.views", *words.split()]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in done.stdout.splitlines()
        if line.startswith("|")
    ]
    assert head[:4] == ["images", "network", "passes", "GFLOPs"]
    assert [row[:3] for row in rows] == [
        ["1", "as it is", "1"], ["1", "efficient", "4"], ["1", "full product", "4"],
        ["2", "as it is", "2"], ["2", "efficient", "8"], ["2", "full product", "32"],
    ]  # fmt: skip
    assert [row[5] for row in rows] == ["4.0", "1.0", "1.0", "16.0", "4.0", "1.0"]
