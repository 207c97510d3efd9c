"""Checkpoints: whole or not there, a bounded number, and taken between two steps while training goes on."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch

from pipeline.base.files import open_filesystem
from pipeline.training.checkpoints import CheckpointManager

FILES = ("state.pt", "plain.safetensors", "complete.json")


def state(step: int) -> dict:
    return {
        "epoch": step // 3,
        "model": {"weight": torch.full((50,), float(step))},
        "losses": [0.5] * step,
        "ema": None,
        "optimizer": {"groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
    }


def best(step: int) -> dict:
    return {"plain": {"weight": torch.arange(4.0) + step}}


def saved(place: Path, *steps: int, keep: int = 3) -> CheckpointManager:
    checkpoints = CheckpointManager(str(place), keep=keep)
    for step in steps:
        checkpoints.save(step, state(step), best(step))
    checkpoints.wait()
    return checkpoints


def test_a_saved_state_loads_with_weights_only(tmp_path):
    checkpoints = saved(tmp_path, 6)
    assert checkpoints.latest() == "step-00000006"
    loaded, weights = checkpoints.load("step-00000006")
    assert torch.equal(loaded["model"]["weight"], torch.full((50,), 6.0))
    assert loaded["losses"] == [0.5] * 6 and loaded["ema"] is None
    assert torch.equal(weights["plain"]["weight"], torch.arange(4.0) + 6)
    assert {path.name for path in (tmp_path / "step-00000006").iterdir()} == set(FILES)


def test_latest_goes_by_step_and_old_checkpoints_are_deleted(tmp_path):
    checkpoints = saved(tmp_path, 3, 6, 9, 12, 100_000, keep=2)
    assert checkpoints.list_names() == ["step-00000012", "step-00100000"]
    assert checkpoints.latest() == "step-00100000"


def test_a_missing_or_empty_folder_has_no_checkpoint(tmp_path):
    assert CheckpointManager(str(tmp_path / "nowhere"), keep=1).latest() is None
    (tmp_path / "step-x").mkdir()
    assert CheckpointManager(str(tmp_path), keep=1).latest() is None


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_checkpoint_is_skipped(tmp_path, file, damage):
    checkpoints = saved(tmp_path, 3, 6)
    damage(tmp_path / "step-00000006" / file)
    assert checkpoints.latest() == "step-00000003"
    assert checkpoints.skipped.keys() == {"step-00000006"}
    if file != "complete.json":
        assert file in checkpoints.skipped["step-00000006"]
    damage(tmp_path / "step-00000003" / file)
    assert checkpoints.latest() is None
    assert checkpoints.skipped.keys() == {"step-00000003", "step-00000006"}


def test_skipped_checkpoints_are_deleted_by_the_next_save(tmp_path):
    checkpoints = saved(tmp_path, 6, 9, keep=1)
    saved(tmp_path, 6, keep=2)
    (tmp_path / "step-00000009").mkdir()  # an attempt that was cut off, further on
    assert checkpoints.latest() == "step-00000006"
    saved(tmp_path, 8, keep=2)
    assert checkpoints.list_names() == ["step-00000006", "step-00000008"]


def test_a_checkpoint_holds_the_state_at_the_call_of_save(tmp_path):
    checkpoints, now = CheckpointManager(str(tmp_path), keep=1), state(3)
    release, write = threading.Event(), checkpoints._write

    def slow(*parts) -> None:
        release.wait(10)
        write(*parts)

    checkpoints._write = slow
    checkpoints.save(3, now, best(3))
    now["model"]["weight"] += 1
    now["losses"].append(9.0)
    release.set()
    checkpoints.wait()
    loaded, _ = checkpoints.load("step-00000003")
    assert torch.equal(loaded["model"]["weight"], torch.full((50,), 3.0)) and len(loaded["losses"]) == 3


def test_a_checkpoint_that_cannot_be_written_is_an_error_at_the_next(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    checkpoints = CheckpointManager(str(blocked / "steps"), keep=1)
    checkpoints.save(1, state(1), best(1))
    with pytest.raises(OSError):
        checkpoints.save(2, state(2), best(2))


def test_the_list_of_a_checkpoint_is_written_last(tmp_path):
    checkpoints = saved(tmp_path, 3)
    folder = tmp_path / "step-00000003"
    listed = json.loads((folder / "complete.json").read_text())
    assert {name: entry["size"] for name, entry in listed.items()} == {
        name: (folder / name).stat().st_size for name in FILES[:2]
    }
    times = [(folder / name).stat().st_mtime_ns for name in FILES]
    assert times == sorted(times)
    assert checkpoints.latest() is not None


def test_checkpoints_go_to_a_folder_or_a_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_filesystem("outputs/vit")[1] == str(tmp_path / "outputs/vit")
    assert open_filesystem(f"file://{tmp_path}/outputs")[1] == str(tmp_path / "outputs")
