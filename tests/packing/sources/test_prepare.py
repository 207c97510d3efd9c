"""The stage `prepare`: its summary of a source, and what it logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from pipeline.packing.sources import detect
from stages import prepare
from tests.packing import layouts
from tests.packing.sources.conftest import TENCH


def test_the_summary_changes_with_names_and_sizes_only(images, tmp_path):
    source = layouts.folder_tree(images, tmp_path / "source")

    def summary() -> dict:
        return prepare.summarize_source(detect.detect_source(str(source)))

    before = summary()
    assert before["layout"] == "a folder tree"
    assert (before["files"], before["bytes"]) == (len(images), sum(map(len, images.values())))
    image = source / "train" / TENCH / f"{TENCH}_3.JPEG"
    os.utime(image, (0, 0))
    assert summary() == before
    image.write_bytes(image.read_bytes() + b"more")
    grown = summary()
    image.rename(image.with_name("renamed.JPEG"))
    assert len({entry["sha256"] for entry in (before, grown, summary())}) == 3


def prepared(root: Path, folder: Path, source: str) -> subprocess.CompletedProcess[str]:
    """The prepare stage, run in a folder for that source."""
    params = (root / "params.yaml").read_text()
    (folder / "params.yaml").write_text(
        params.replace("name: digits ", "name: mine ").replace("data/source/digits", source)
    )
    return subprocess.run(
        [sys.executable, "-m", "stages.prepare"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )


def test_the_prepare_stage_logs_the_detected_layout(root, images, tmp_path):
    layouts.archives(images, tmp_path / "imagenet")
    ended = prepared(root, tmp_path, "imagenet")
    assert ended.returncode == 0
    assert ended.stderr.endswith(" imagenet: the official archives, 3 files, 0.1 MB\n") and not ended.stdout
    assert json.loads((tmp_path / "data" / "source.json").read_text())["layout"] == "the official archives"


def test_a_missing_source_is_reported_on_the_command_line(root, tmp_path):
    ended = prepared(root, tmp_path, "data/source/mine")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: missing data folder: data/source/mine not found. Set data.source")
    assert "Traceback" not in ended.stderr and not (tmp_path / "data").exists()
