"""Writes photo-like JPEGs for benchmarks: about 110 KB at about 500x375, like ImageNet's.

    python benchmarks/photos.py /tmp/photos --images 2000          2,000 training and 100 validation photos

The photos are random crops of scikit-learn's two sample photos, randomly mirrored and brightened or darkened, with
noise that sets the file size. They are in `{train,val}/<wnid>/` under names like ImageNet's. Equal arguments give equal
bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import simplejpeg
from sklearn.datasets import load_sample_images
from timm.data import ImageNetInfo

SIDES = ((375, 500), (333, 500), (375, 500), (400, 500), (500, 375))  # rows, columns
NOISE = (5.0, 12.0)  # standard deviation in gray levels
GAIN = (0.7, 1.2)
QUALITY = 95


def photos(
    num: int, *, split: str = "train", classes: int = 10, seed: int = 0, processes: int = 2
) -> Iterator[tuple[str, bytes]]:
    """Yields (name, JPEG) of `num` photos, class by class as in ImageNet's archives, about 100 per second."""
    wnids = ImageNetInfo().label_names()[:classes]
    names = [_name(split, wnids[number * classes // num], number) for number in range(num)]
    tasks = [(seed, split == "val", number) for number in range(num)]
    with get_context("spawn").Pool(processes) as pool:
        yield from zip(names, pool.imap(_photo, tasks, chunksize=16), strict=True)


def write_photos(folder: Path, num: int, *, val: int = 100, classes: int = 10, seed: int = 0) -> None:
    """Writes `num` training and `val` validation photos to `{train,val}/<wnid>/*.JPEG` unless they exist."""
    for split, count in (("train", num), ("val", val)):
        if len(list((folder / split).glob("*/*.JPEG"))) == count:
            continue
        for name, jpeg in photos(count, split=split, classes=classes, seed=seed):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg)


def _name(split: str, wnid: str, number: int) -> str:
    file = f"{wnid}_{number}" if split == "train" else f"ILSVRC2012_val_{number + 1:08d}"
    return f"{split}/{wnid}/{file}.JPEG"


@cache
def _samples() -> list[np.ndarray]:
    return load_sample_images().images  # type: ignore[attr-defined]


def _photo(task: tuple[int, bool, int]) -> bytes:
    """One JPEG, a pure function of (seed, whether for validation, number)."""
    rng = np.random.default_rng(task)
    sample = _samples()[rng.integers(2)]
    rows, columns = SIDES[rng.integers(len(SIDES))]
    if rows > len(sample):
        sample = np.ascontiguousarray(sample.transpose(1, 0, 2))
    top, left = rng.integers(len(sample) - rows + 1), rng.integers(sample.shape[1] - columns + 1)
    crop = sample[top : top + rows, left : left + columns]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    noise = rng.standard_normal(crop.shape, dtype=np.float32)
    pixels = crop * np.float32(rng.uniform(*GAIN)) + noise * np.float32(rng.uniform(*NOISE))
    jpeg = np.ascontiguousarray(pixels.clip(0, 255).astype(np.uint8))
    return simplejpeg.encode_jpeg(jpeg, quality=QUALITY, colorsubsampling="420")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=2000, help="number of training photos")
    parser.add_argument("--val", type=int, default=100, help="number of validation photos")
    parser.add_argument("--classes", type=int, default=10)
    args = parser.parse_args()
    write_photos(args.folder, args.images, val=args.val, classes=args.classes)


if __name__ == "__main__":
    main()
