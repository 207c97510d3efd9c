"""What a run predicts for each validation image: outputs/<run>/predictions.parquet, over which runs are compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from pipeline.base.files import atomic_path

FILE_NAME = "predictions.parquet"

SCHEMA = pa.schema([("key", pa.string()), ("label", pa.int64()), ("top1", pa.int64()), ("loss", pa.float64())])
"""A row per validation image, in the order of the index: its key there, its label, the class with the largest logit,
and the cross-entropy."""


class ImageHits(NamedTuple):
    """Which validation images a run classifies correctly."""

    hits: NDArray[np.bool_]
    """(num_images,)"""
    images: str
    """Hash of the images' keys and labels, in order: hits can be paired where it is the same."""


def write_predictions(
    folder: Path, keys: Sequence[str], labels: Sequence[int], top1: Sequence[int], losses: Sequence[float]
) -> Path:
    """Writes the predictions of a run into its folder and returns the file's path."""
    path = folder / FILE_NAME
    table = pa.Table.from_arrays([pa.array(column) for column in (keys, labels, top1, losses)], schema=SCHEMA)
    with atomic_path(path) as partial:
        pq.write_table(table, partial)
    return path


def read_hits(folder: Path) -> ImageHits | None:
    """Returns the hits of a run; None if it was evaluated before its predictions were kept, or not at all."""
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    table = pq.read_table(path, columns=["key", "label", "top1"])
    labels = table["label"].to_numpy()
    content = "\0".join(table["key"].to_pylist()).encode() + labels.tobytes()
    return ImageHits(table["top1"].to_numpy() == labels, xxh3_128_hexdigest(content))
