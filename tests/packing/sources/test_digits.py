"""The digits: written once, and not among other images."""

from __future__ import annotations

from collections import Counter

import pytest
from PIL import Image

from pipeline.base.errors import ConfigError
from pipeline.packing.sources import detect, digits
from tests.packing import layouts


def test_digits_are_written_once_and_split_by_class(tmp_path):
    digits.write_digits(tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg")}
    counts = Counter(path.parts[-3] for path in written)
    assert counts == {"train": 1437, "val": 360}
    of_class = Counter(path.parts[-2] for path in written if "val" in path.parts)
    assert len(of_class) == 10 and set(of_class.values()) <= {35, 36, 37}
    with Image.open(min(written)) as image:
        assert image.size == (32, 32)

    gone, kept = sorted(written)[:2]
    image = gone.read_bytes()
    gone.unlink()
    before = detect.detect_source(str(tmp_path)).list_files()
    digits.write_digits(tmp_path)
    assert gone.read_bytes() == image
    assert kept.stat().st_mtime_ns == written[kept]
    assert detect.detect_source(str(tmp_path)).list_files() != before


def test_digits_do_not_mix_with_images_of_others(images, tmp_path):
    layouts.folder_tree(images, tmp_path)
    with pytest.raises(ConfigError, match=r"train/.*JPEG is not part of the digits"):
        digits.write_digits(tmp_path)
    assert not list(tmp_path.rglob("*.jpg"))


def test_the_digits_may_have_been_looked_at(tmp_path):
    digits.write_digits(tmp_path)
    (tmp_path / "train" / ".DS_Store").touch()
    digits.write_digits(tmp_path)
    (tmp_path / "train" / "mine.jpg").touch()
    with pytest.raises(ConfigError, match="mine.jpg is not part of the digits"):
        digits.write_digits(tmp_path)
