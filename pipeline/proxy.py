"""A cheaper stand-in for a data set: some of its classes, spread evenly over the list of them."""

from __future__ import annotations

import pyarrow as pa
import torch
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.data import IndexedImages, Shards


class ClassSubset(IndexedImages):
    """The images of some classes, in the index's order; labels count through those classes."""

    def __init__(self, shards: Shards, split: str, classes: Tensor) -> None:
        super().__init__(shards, split)
        rows = torch.isin(self.labels, classes).nonzero().flatten()
        self.labels = torch.searchsorted(classes, self.labels[rows])
        picked = rows.numpy()
        self._key = self._key.take(pa.array(picked))
        self._shard, self._offset, self._size = self._shard[picked], self._offset[picked], self._size[picked]


def images(shards: Shards, num_classes: int | None) -> tuple[dict[str, IndexedImages], int]:
    """Both splits, and the number of classes in them; None: all.

    Raises: ConfigError where there are not so many.
    """
    if num_classes is None:
        return {split: IndexedImages(shards, split) for split in ("train", "val")}, shards.num_classes
    if num_classes > shards.num_classes:
        raise ConfigError(f"proxy.classes {num_classes}: the data set has {shards.num_classes}")
    classes = torch.arange(num_classes) * shards.num_classes // num_classes
    return {split: ClassSubset(shards, split, classes) for split in ("train", "val")}, num_classes
