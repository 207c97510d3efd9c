"""Lays out the source images: writes the digits, or says what data.source names.

The digits are scikit-learn's (1,797 of 8x8 grey pixels; Alpaydin and Kaynak, UCI ML repository, 1998), as
32x32 RGB JPEGs in `{train,val}/<class>/`. The out that DVC knows is a summary, `data/source.json`, so that the
images, which may be many and a user's own, are neither cached nor ever deleted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from pipeline import config, sources
from pipeline.config import ConfigError
from pipeline.sources import ExistingShards, Source
from stages import main

DIGITS = "digits"
NUM_VAL = 360
SPLIT_SEED = 0
"""The split belongs to the data set: another would be another data set, whatever the experiment's seed."""
SUMMARY = Path("data/source.json")


def run() -> None:
    data = config.load().data
    source = ensure(data)
    found = summary(source)
    SUMMARY.parent.mkdir(parents=True, exist_ok=True)
    SUMMARY.write_text(json.dumps(found, indent=1) + "\n")
    logging.info(f"{data.source}: {found['layout']}, {found['files']:,} files, {found['bytes'] / 1e6:,.1f} MB")


def ensure(data: config.Data) -> Source | ExistingShards:
    """What `data.source` names, with the digits written if they are asked for.

    Raises: SourceError if nothing that can be read is there.
    """
    if data.name == DIGITS:
        write_digits(Path(data.source))
    return sources.detect(data.source)


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


def summary(source: Source | ExistingShards) -> dict[str, Any]:
    """Layout, number and bytes of the files, and a hash of their names and sizes: what changes when an image does."""
    files = sorted(source.files())
    digest = hashlib.sha256()
    for name, size in files:
        digest.update(f"{name}\t{size}\n".encode(errors="surrogateescape"))
    return {
        "layout": source.layout,
        "files": len(files),
        "bytes": sum(size for _, size in files),
        "sha256": digest.hexdigest(),
    }


if __name__ == "__main__":
    main(run)
