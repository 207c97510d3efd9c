"""Writes images without an up: crops of seven pictures that scikit-image ships, turned at random, as an image folder.

    python -m benchmarks.turned_crops data/source/turned-crops                        with scikit-image installed
    python -m benchmarks.turned_crops data/source/turned-crops --pictures FOLDER      with its folder skimage/data

The class of an image is the picture that it was cut from: bricks, grass, gravel, stained tissue, the deep sky, the
moon, a retina. Training images are from the left two thirds of each picture, validation images from the right third.
Every crop is turned by any angle, and mirrored with probability 1/2, so that its label does not depend on its
orientation. Its mean and its contrast are set to fixed values, so that brightness says nothing about the class.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PICTURES = {
    "brick": "brick.png",
    "deep_sky": "hubble_deep_field.jpg",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "moon": "moon.png",
    "retina": "retina.jpg",
    "tissue": "ihc.png",
}
"""Files of scikit-image's folder `data` by class."""

SIZE = 28
"""Side of a crop, in pixels of the picture and of the image."""

NUM_IMAGES = {"train": 300, "val": 400}
"""Images of each class."""

_REACH = math.ceil(SIZE / math.sqrt(2)) + 2  # pixels from the center of a turned crop to its corner, and to interpolate

_LEAST_CONTRAST = 2.0  # levels; the picture of the retina has a black border


def draw_crops(picture: NDArray[np.uint8], split: str, count: int, seed: int) -> NDArray[np.uint8]:
    """Returns `count` crops of one part of a gray picture (H, W), as (count, SIZE, SIZE)."""
    height, width = picture.shape
    border = 2 * width // 3
    left, right = {"train": (0, border), "val": (border, width)}[split]
    rng = np.random.default_rng([seed, split == "val"])
    image = Image.fromarray(picture)
    crops = []
    while len(crops) < count:
        x, y = rng.uniform(left + _REACH, right - _REACH), rng.uniform(_REACH, height - _REACH)
        crop = _cut(image, x, y, angle=rng.uniform(0, 2 * math.pi), mirror=rng.random() < 0.5)
        if crop.std() >= _LEAST_CONTRAST:
            crops.append(np.clip(128 + 48 * (crop - crop.mean()) / crop.std(), 0, 255).round().astype(np.uint8))
    return np.stack(crops)


def load_split(pictures: Path, split: str, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Returns the crops of all classes, (N, SIZE, SIZE), and their labels, (N,)."""
    crops = [draw_crops(_load_gray(pictures / name), split, count, seed) for seed, name in enumerate(PICTURES.values())]
    return np.concatenate(crops), np.repeat(np.arange(len(PICTURES)), count)


def find_pictures(given: Path | None) -> Path:
    """Returns the folder of the pictures: the given one, or that of the installed scikit-image.

    Raises: ValueError, with what to do, if pictures are missing.
    """
    if given is None:
        package = importlib.util.find_spec("skimage")
        if package is None or package.origin is None:
            raise ValueError(
                "the pictures are scikit-image's: pip install scikit-image, or name a folder by --pictures"
            )
        given = Path(package.origin).parent / "data"
    if missing := [name for name in PICTURES.values() if not (given / name).is_file()]:
        raise ValueError(f"{given} has no {', '.join(missing)}: name scikit-image's folder skimage/data by --pictures")
    return given


def main() -> None:
    """Writes `{train,val}/<class>/<number>.png` into a folder that is empty or missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pictures", type=Path, help="scikit-image's folder skimage/data, if it is not installed")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        sys.exit(f"error: {args.out} is not empty")
    try:
        pictures = find_pictures(args.pictures)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for split, count in NUM_IMAGES.items():
        crops, labels = load_split(pictures, split, count)
        for number, (crop, label) in enumerate(zip(crops, labels, strict=True)):
            path = args.out / split / list(PICTURES)[label] / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(crop).save(path)
        print(f"{args.out / split}: {len(crops)} images in {len(PICTURES)} classes")


def _load_gray(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


def _cut(image: Image.Image, x: float, y: float, *, angle: float, mirror: bool) -> NDArray[np.float64]:
    """Returns the crop centered at (x, y), turned and mirrored, as (SIZE, SIZE) levels."""
    cos, sin = math.cos(angle), math.sin(angle)
    # PIL maps each pixel (u, v) of the result to (a u + b v + c, d u + e v + f) in the picture.
    a, b, d, e = (-cos, -sin, -sin, cos) if mirror else (cos, -sin, sin, cos)
    middle = SIZE / 2
    affine = (a, b, x - (a + b) * middle, d, e, y - (d + e) * middle)
    crop = image.transform((SIZE, SIZE), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    return np.asarray(crop, dtype=np.float64)


if __name__ == "__main__":
    main()
