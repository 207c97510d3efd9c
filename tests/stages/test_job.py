"""Jobs on a cluster, whose results last."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.base import locks
from pipeline.base.errors import ConfigError
from stages import job

ROOT = Path(__file__).resolve().parents[2]


def test_a_job_copies_code_and_keeps_results(tmp_path, root):
    place = tmp_path / "study"
    place.mkdir()
    job.copy_code(root, place)
    (place / "outputs").mkdir()
    (place / "outputs" / "kept").touch()
    (place / "flopeq" / "of_an_older_version.py").touch()
    job.copy_code(root, place)
    assert (place / "outputs" / "kept").exists()
    assert not (place / "flopeq" / "of_an_older_version.py").exists()  # it could still be imported
    assert (place / "stages" / "repro.py").read_bytes() == (root / "stages" / "repro.py").read_bytes()
    command = [sys.executable, "-m", "dvc", "stage", "list", "--name-only"]
    stages = subprocess.check_output(command, cwd=place, text=True)
    assert "train@e-vit" in stages.split()


def test_a_folder_has_one_job_at_a_time(tmp_path, root):
    held = locks.acquire_lock(tmp_path / ".job", "")
    done = subprocess.run(
        [sys.executable, "-m", "stages.job", str(tmp_path), "check"], cwd=root, text=True, capture_output=True
    )
    os.close(held)
    assert done.returncode == 2 and "is already in use by process" in done.stderr


def test_an_unknown_stage_is_named_before_a_job_touches_its_folder(tmp_path):
    with pytest.raises(ConfigError, match="no stage named 'reproduce'; known: .*repro"):
        job.run(str(tmp_path / "study"), "reproduce")
    assert not (tmp_path / "study").exists()
