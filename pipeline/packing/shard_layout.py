"""Assigns images to shards, with their order and their keys."""

from __future__ import annotations

import hashlib
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.errors import SourceError
from pipeline.packing.shard_task import ShardTask
from pipeline.packing.sources.listing import Listing
from pipeline.packing.tar_writer import tar_size
from pipeline.shards.manifests import SPLITS

_CHUNK_ROWS = 1 << 16  # number of names that are Python objects at a time


class ShardLayout:
    """The assignment of the images of a listing to shards.

    Holds the images as columns. Each ShardTask gets a copy of only its own rows.
    Raises: SourceError if two images have the same key.
    """

    def __init__(
        self, listing: Listing, root: Path, out: Path, *, images_per_shard: int, seed: int, skip_bad_images: bool
    ) -> None:
        self.root, self.out, self.skip_bad_images = root, out, skip_bad_images
        self._images: dict[str, pa.Table] = {}
        self._rows: dict[str, np.ndarray] = {}
        for split in SPLITS:
            images = listing.splits[split]
            self._images[split] = images.append_column("key", _image_keys(images["name"]))
            order = _shuffled_order(images["name"], seed) if split == "train" else np.arange(len(images))
            for number, start in enumerate(range(0, len(images), images_per_shard)):
                self._rows[f"{split}-{number:06d}.tar"] = order[start : start + images_per_shard]

    def shards(self, split: str) -> list[str]:
        """Returns the names of the shards of a split, in order."""
        return [shard for shard in self._rows if shard.startswith(f"{split}-")]

    def tasks(self) -> Iterator[ShardTask]:
        """Yields one task per shard."""
        for split, images in self._images.items():
            for shard in self.shards(split):
                yield ShardTask(
                    self.root, self.out, shard, images.take(self._rows[shard]).combine_chunks(), self.skip_bad_images
                )

    def num_bytes(self) -> int:
        """Returns the total size of all images."""
        return sum(int(images["size"].to_numpy().sum()) for images in self._images.values())

    def tar_sizes(self) -> dict[str, int]:
        """Returns the size of each shard in bytes, assuming that no image is bad or has another format."""
        return {
            shard: tar_size(np.append(images["size"].to_numpy()[self._rows[shard]], [1] * len(self._rows[shard])))
            for split, images in self._images.items()
            for shard in self.shards(split)
        }


def _image_keys(names: pa.ChunkedArray) -> pa.Array:
    """Returns the key of each image: its name without the suffix.

    Other dots in the file name become underscores, because WebDataset ends a key at the first dot.
    """
    keys = _regex_replace(names, r"\.[^./]*$", "").combine_chunks()
    while (undotted := _regex_replace(keys, r"\.([^./]*)$", r"_\1")) != keys:  # replaces the last dot of the file name
        keys = undotted
    _check_lengths(names, keys)
    if len(keys.unique()) < len(keys):
        key, _ = Counter(keys.to_pylist()).most_common(1)[0]
        first, second, *_ = (name for name, own in zip(names.to_pylist(), keys.to_pylist(), strict=True) if own == key)
        raise SourceError(f"{first} and {second} would both have the key {key}: rename one of them")
    return keys


def _check_lengths(names: pa.ChunkedArray, keys: pa.Array) -> None:
    """Raises SourceError for a name that does not fit into the header of a tar, before anything is written."""
    is_long = pc.call_function(
        "greater", [pc.call_function("binary_length", [keys]), tarfile.LENGTH_NAME - len(".jpg")]
    )
    for name, key in zip(names.filter(is_long).to_pylist(), keys.filter(is_long).to_pylist(), strict=True):
        try:
            tarfile.TarInfo(f"{key}.jpg").tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
        except ValueError:
            folder, _, file = key.rpartition("/")
            raise SourceError(
                f"{name}: the name is too long for a tar, which has {tarfile.LENGTH_PREFIX} bytes for the folder and "
                f"{tarfile.LENGTH_NAME} for the file: {folder} has {len(folder.encode())}, {file}.jpg "
                f"{len(file.encode()) + 4} (in UTF-8, a letter other than a to z has 2 to 4 bytes); rename it"
            ) from None


def _regex_replace(strings: Any, pattern: str, replacement: str) -> Any:
    return pc.call_function("replace_substring_regex", [strings], pc.ReplaceSubstringOptions(pattern, replacement))


def _shuffled_order(names: pa.ChunkedArray, seed: int) -> np.ndarray:
    """Returns the rows (num,) int64, sorted by a seeded hash of their names. `names` must be sorted."""
    prefix, hashes = f"{seed}/".encode(), []
    for start in range(0, len(names), _CHUNK_ROWS):
        chunk = names.slice(start, _CHUNK_ROWS).to_pylist()
        digests = b"".join(hashlib.blake2b(prefix + name.encode(), digest_size=8).digest() for name in chunk)
        hashes.append(np.frombuffer(digests, ">u8"))
    return np.argsort(np.concatenate(hashes), kind="stable")
