"""Map-style data sets of the images of a split, of a subset of its classes, and of a stratified subset."""

from __future__ import annotations

import copy
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.base.errors import ConfigError, ShardError
from pipeline.loading.decode import decode_image
from pipeline.shards.manifests import Shards
from pipeline.shards.store import VERIFY_HINT, ByteRange

_HEADER_BYTES = tarfile.BLOCKSIZE  # size of the last block before the content of a member, which holds its name

_MAX_HEADER_NAME = 99  # bytes; the block does not hold the whole of a longer name


class ImageDataset(Protocol):
    """Images of a split that can be batched."""

    labels: Tensor
    """(num_images,) int64."""

    def __len__(self) -> int: ...

    def read_jpegs(self, rows: Sequence[int]) -> list[bytes]:
        """Returns the encoded images of the given rows."""
        ...

    def decode(self, row: int, jpeg: bytes) -> Tensor:
        """Decodes one image to uint8 (3, H, W). Raises: ShardError or SourceError, naming the image."""
        ...


class IndexedImages(Dataset):
    """A split as a map-style data set: `images[row]` is (uint8 (3, H, W), label), in the order of the index.

    It works with any sampler of torch and timm. A DataLoader reads each batch with one call. The data set can be forked
    and pickled at any time.

    Args:
        transform: applied to each image by `__getitem__`; None: no transform. `train_batches` applies its own.
    Raises: ShardError if a shard does not match the index or if an image cannot be decoded.
    """

    def __init__(
        self, shards: Shards | Path | str, split: str, transform: Callable[[Tensor], Any] | None = None
    ) -> None:
        self.shards = shards if isinstance(shards, Shards) else Shards(shards)
        self.split, self.transform = split, transform
        index = pq.read_table(self.shards.folder / f"{split}.index.parquet", read_dictionary=["shard"])
        shard = index["shard"].combine_chunks()
        self._key = index["key"].combine_chunks()
        self._names: list[str] = shard.dictionary.to_pylist()
        self._shard = shard.indices.to_numpy()
        self._offset = index["offset"].to_numpy()
        self._size = index["size"].to_numpy()
        self.labels = torch.from_numpy(index["label"].to_numpy().copy())
        """(num_images,) int64."""

    def __len__(self) -> int:
        return len(self._size)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Any, int]]:
        return [
            (self.decode(row, jpeg) if self.transform is None else self.transform(self.decode(row, jpeg)), label)
            for row, jpeg, label in zip(rows, self.read_jpegs(rows), self.labels[rows].tolist(), strict=True)
        ]

    def read_jpegs(self, rows: Sequence[int]) -> list[bytes]:
        """Reads the JPEGs of the given rows. Compares the tar header before each JPEG with the index."""
        parts = [
            ByteRange(
                self._names[self._shard[row]],
                int(self._offset[row]) - _HEADER_BYTES,
                int(self._size[row]) + _HEADER_BYTES,
            )
            for row in rows
        ]
        contents = self.shards.store.read_many(parts)
        for row, content in zip(rows, contents, strict=True):
            self._check_header(row, content[:_HEADER_BYTES])
        return [content[_HEADER_BYTES:] for content in contents]

    def decode(self, row: int, jpeg: bytes) -> Tensor:
        """Decodes the JPEG of the given row to uint8 (3, H, W)."""
        try:
            return decode_image(jpeg)
        except ValueError as error:
            (key,) = self.keys([row])
            raise ShardError(f"{self._location(row)}: {key} cannot be decoded ({error}): {VERIFY_HINT}") from None

    def keys(self, rows: Sequence[int] | Tensor) -> list[str]:
        """Returns the keys of the images in the tars, `<split>/<class>/<name>`, for messages."""
        return [self._key[int(row)].as_py() for row in rows]

    def select(self, rows: Tensor) -> IndexedImages:
        """Returns a data set of the given rows, in the given order."""
        selected, indices = copy.copy(self), rows.numpy()
        selected.labels = self.labels[rows]
        selected._key = self._key.take(pa.array(indices))
        selected._shard, selected._offset, selected._size = (
            column[indices] for column in (self._shard, self._offset, self._size)
        )
        return selected

    def _check_header(self, row: int, header: bytes) -> None:
        """Raises ShardError unless this is the tar header of the image of the row."""
        (key,), size = self.keys([row]), self._size[row]
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            found = "no header of a tar member"
        else:
            if member.size == size and _name_matches_key(member.name, key):
                return
            found = f"{member.name} of {member.size} bytes"
        expected = f"the index expects {key} of {size} bytes at byte {self._offset[row]}"
        raise ShardError(f"{self._location(row)}: {expected}, found {found}: {VERIFY_HINT}")

    def _location(self, row: int) -> str:
        return self.shards.store.location_of(self._names[self._shard[row]])


def _name_matches_key(name: str, key: str) -> bool:
    """Whether the name in a tar header is that of the JPEG of a key. A header may hold only the start of the name."""
    header = name.encode("utf-8", "surrogateescape")
    # If a PAX header holds the name, non-ASCII characters are replaced in this header.
    encodings = (f"{key}.".encode(), f"{key}.".encode("ascii", "replace"))
    return any(
        header.startswith(encoded) or len(header) >= _MAX_HEADER_NAME and encoded.startswith(header)
        for encoded in encodings
    )


def select_classes(images: IndexedImages, classes: Tensor) -> IndexedImages:
    """Returns the images of some classes, in the order of the index. Labels are indices into these classes."""
    selected = images.select(torch.isin(images.labels, classes).nonzero().flatten())
    selected.labels = torch.searchsorted(classes, selected.labels)
    return selected


def stratified_rows(labels: Tensor, num_images: int, seed: int) -> Tensor:
    """Returns the rows of a subset with the classes in their proportions, ascending, (num_images,) int64.

    The images of each class are put in a random order, and the k-th of n gets the place (k - u) / n, with a random u in
    [0, 1) for each class. The subset is the first `num_images` in the order of their places. So a smaller subset is
    part of a larger one, and classes of equal size differ by at most one image.

    Args:
        labels: (N,) int64.
    Raises: ValueError if there are fewer images.
    """
    if num_images > len(labels):
        raise ValueError(f"there are {len(labels)} images, too few for a subset of {num_images}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    by_class = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    number_in_class = torch.arange(1, len(labels) + 1) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    offsets = torch.rand(len(counts), generator=generator, dtype=torch.float64).repeat_interleave(counts)
    places = (number_in_class - offsets) / counts.repeat_interleave(counts)
    return by_class[places.argsort(stable=True)[:num_images]].sort().values


def load_splits(shards: Shards, num_classes: int | None) -> tuple[dict[str, IndexedImages], int]:
    """Returns both splits and their number of classes.

    Args:
        num_classes: size of an evenly spaced subset of the classes, a cheaper substitute for the data set; None: all.
    Raises: ConfigError if the data set has fewer classes.
    """
    if num_classes is None:
        return {split: IndexedImages(shards, split) for split in ("train", "val")}, shards.num_classes
    if num_classes > shards.num_classes:
        raise ConfigError(f"proxy.classes {num_classes}: the data set has {shards.num_classes}")
    classes = torch.arange(num_classes) * shards.num_classes // num_classes
    return {split: select_classes(IndexedImages(shards, split), classes) for split in ("train", "val")}, num_classes
