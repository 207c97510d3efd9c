"""Lays out the source images: writes the digits, or checks the folder that data.source names.

The digits are scikit-learn's (1,797 of 8x8 grey pixels; Alpaydin and Kaynak, UCI ML repository, 1998), as
32x32 RGB JPEGs in `{train,val}/<class>/`. The out that DVC knows is a listing, `data/source.json`, so that a
folder of images, which may be large and a user's own, is neither cached nor ever deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pipeline import config
from pipeline.config import ConfigError
from stages import main

DIGITS = "digits"
SPLITS = ("train", "val")
NUM_VAL = 360
SPLIT_SEED = 0
"""The split belongs to the data set: another would be another data set, whatever the experiment's seed."""
LISTING = Path("data/source.json")


def run() -> None:
    data = config.load().data
    ensure(data)
    LISTING.parent.mkdir(parents=True, exist_ok=True)
    LISTING.write_text(json.dumps(listing(data.source), indent=1) + "\n")


def ensure(data: config.Data) -> None:
    """Makes sure that the images of `data.source` are there, writing the digits if they are asked for.

    Raises: ConfigError if the folder is missing, and is not the digits'.
    """
    if data.name == DIGITS:
        write_digits(data.source)
    missing = [str(data.source / split) for split in SPLITS if not (data.source / split).is_dir()]
    if missing:
        raise ConfigError(
            f"missing data folder: {' and '.join(missing)}. Put the images of {data.name!r} into "
            f"{data.source}/{{train,val}}/<class>/, or set data.source in params.yaml to where they are "
            f"(only {DIGITS!r} are written for you)"
        )


def write_digits(folder: Path) -> None:
    """Writes what is missing of the digits, and touches nothing else.

    Raises: ConfigError if the folder holds other files.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    train, val = train_test_split(
        np.arange(len(digits.target)), test_size=NUM_VAL, stratify=digits.target, random_state=SPLIT_SEED
    )
    places = {
        folder / split / str(digits.target[row]) / f"{row:04d}.jpg": row
        for split, rows in (("train", train), ("val", val)) for row in sorted(rows)
    }
    present = {path for path in folder.rglob("*") if path.is_file() and path.suffix != ".partial"}
    if foreign := present - places.keys():
        raise ConfigError(
            f"{min(foreign)} is none of the digits, which data.name asks for: "
            f"give data another name, or set data.source to another folder"
        )
    for path, row in places.items():
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = np.round(digits.images[row] * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(grey).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
        partial = path.with_suffix(".partial")
        image.save(partial, "JPEG", quality=95)
        os.replace(partial, path)


def listing(folder: Path) -> dict[str, object]:
    """Counts, bytes and a hash of all names and sizes: what changes when an image comes or goes."""
    files = sorted(
        (path.relative_to(folder).as_posix(), path.stat().st_size)
        for split in SPLITS for path in (folder / split).rglob("*") if path.is_file()
    )
    digest = hashlib.sha256("\n".join(f"{name}\t{size}" for name, size in files).encode())
    return {
        "source": folder.as_posix(),
        "files": {split: sum(name.startswith(f"{split}/") for name, _ in files) for split in SPLITS},
        "bytes": sum(size for _, size in files),
        "sha256": digest.hexdigest(),
    }


if __name__ == "__main__":
    main(run)
