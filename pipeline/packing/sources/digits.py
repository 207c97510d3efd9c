"""The default data set: scikit-learn's handwritten digits as a folder tree of JPEGs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pipeline.base import schema
from pipeline.base.errors import ConfigError
from pipeline.base.images import is_system_file
from pipeline.packing.sources import detect
from pipeline.packing.sources.detect import ExistingShards, Source

DIGITS_NAME = "digits"

NUM_VAL = 360

SPLIT_SEED = 0
"""The split is part of the data set, so it does not depend on the seed of the experiment."""


def open_source(data: schema.Data) -> Source | ExistingShards:
    """What `data.source` names, with the digits written if they are asked for.

    Raises: SourceError if nothing that can be read is there.
    """
    if data.name == DIGITS_NAME:
        write_digits(Path(data.source))
    return detect.detect_source(data.source, data.class_names, data.source_hint)


def write_digits(folder: Path) -> None:
    """Writes the missing images of the digits data set. Existing files are not touched.

    Raises: ConfigError if the folder contains other files.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    train, val = train_test_split(
        np.arange(len(digits.target)), test_size=NUM_VAL, stratify=digits.target, random_state=SPLIT_SEED
    )
    path_to_row = {
        folder / split / str(digits.target[row]) / f"{row:04d}.jpg": row
        for split, rows in (("train", train), ("val", val))
        for row in sorted(rows)
    }
    present = {
        path
        for path in folder.rglob("*")
        if path.is_file() and not (path.suffix == ".partial" or is_system_file(path.name))
    }
    if unexpected := present - path_to_row.keys():
        raise ConfigError(
            f"{min(unexpected)} is not part of the digits data set that data.name selects: "
            f"change data.name, or set data.source to another folder"
        )
    for path, row in path_to_row.items():
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        gray = np.round(digits.images[row] * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(gray).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
        partial = path.with_suffix(".partial")
        image.save(partial, "JPEG", quality=95)
        os.replace(partial, path)
