"""benchmarks/equivariant.py: a small run of it makes its table."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_benchmark_makes_a_markdown_table(root):
    words = "--families resmlp --sizes T --variants E H --splits 3 9 --run eager --modes forward train --markdown"
    few = "--device cpu --batch-size 1 --runs 2"
    command = [sys.executable, "benchmarks/equivariant.py", *words.split(), *few.split()]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, ruler, *rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in head.strip("|").split("|")] == [
        "network", "mode", "img/s", "quartiles", "FLOPs", "faster", "quartiles", "share",
    ]  # fmt: skip
    assert ruler.startswith("| --- | --- | ---: |")
    assert [row.split("|")[1].strip() for row in rows] == 2 * [
        "ResMLP-T12", "E(ResMLP-T12)", "H(ResMLP-T12), 3 equivariant", "H(ResMLP-T12), 9 equivariant",
    ]  # fmt: skip
    assert ["| 1.95 |" in row for row in rows] == 2 * [False, True, False, False]
