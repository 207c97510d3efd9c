"""benchmarks/orientation.py: its crops come from where they should, and a small run of it makes its table."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import orientation, turned_crops
from tests.packing import layouts

SETTINGS = '{"seeds": 1, "epochs": 2, "batch_size": 16, "train_images": 35, "val_images": 21}'


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Noise under the names of scikit-image's pictures."""
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for name in turned_crops.PICTURES.values():
        Image.fromarray(rng.integers(0, 256, (80, 180), np.uint8)).save(tmp_path / "pictures" / name)
    return tmp_path / "pictures"


def test_a_crop_is_cut_turned_and_mirrored() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (60, 60), np.uint8)
    image, expected = Image.fromarray(picture), picture[16:44, 16:44]
    for angle, mirror, crop in (
        (0.0, False, expected),
        (0.0, True, expected[:, ::-1]),
        (math.pi / 2, False, np.rot90(expected)),
    ):
        np.testing.assert_allclose(turned_crops._cut(image, 30, 30, angle=angle, mirror=mirror), crop, atol=1)


@pytest.mark.parametrize(("split", "left", "right"), [("train", 0, 120), ("val", 120, 180)])
def test_crops_stay_in_the_part_of_their_split(split: str, left: int, right: int, monkeypatch) -> None:
    picture, centers, cut = np.random.default_rng(0).integers(0, 256, (80, 180), np.uint8), [], turned_crops._cut
    monkeypatch.setattr(turned_crops, "_cut", lambda image, x, y, **turn: centers.append(x) or cut(image, x, y, **turn))
    crops = turned_crops.draw_crops(picture, split, 40, seed=1)
    corner = turned_crops.SIZE / math.sqrt(2)
    assert crops.shape == (40, 28, 28) and abs(crops.mean() - 128) < 2 and len(set(centers)) == 40
    assert left <= min(centers) - corner and max(centers) + corner <= right


def test_a_small_run_makes_its_table_and_a_second_one_trains_nothing(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    pixels = {split: rng.integers(0, 256, (40, 28, 28), np.uint8) for split in ("train", "val")}
    data = layouts.idx_files(pixels, {s: np.arange(40, dtype=np.uint8) % 10 for s in pixels}, tmp_path / "data", ".gz")
    words = f"--pictures {pictures} --fashion-mnist {data} --out {tmp_path / 'out'} --settings".split()
    monkeypatch.setattr(sys, "argv", ["orientation", *words, SETTINGS])
    monkeypatch.setattr(orientation, "VARIANTS", ("X", "E", "D4"))
    with caplog.at_level("INFO"):
        orientation.main()
    assert "6/6: D4 of convnext, Fashion-MNIST, seed 0" in caplog.text
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("| D4(convnext) | 9 k |") == 2 and table.count("| convnext | 6") == 2
    caplog.clear()
    orientation.main()
    assert "seed 0" not in caplog.text and (tmp_path / "out" / "table.md").read_text() == table
    monkeypatch.setattr(sys, "argv", ["orientation", *words, SETTINGS.replace('"epochs": 2', '"epochs": 3')])
    with pytest.raises(SystemExit, match="other settings"):
        orientation.main()
