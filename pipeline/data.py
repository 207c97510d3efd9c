"""Reading the shards through their index: any order, every image once, resumable anywhere.

Order is a pure function of (seed, epoch, rank, world size). Global batch b of an epoch holds the places
[b G, (b+1) G) of the epoch's order, and rank r takes its contiguous r-th part of each. What is random in an
image follows its place (pipeline/augment.py), so any world size, and a resumed run, sees the same pixels.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from pipeline import augment
from pipeline.config import Data, Recipe

_FETCHED_AHEAD = 4  # batches that each loader process prepares in advance
_ERASING, _MIXING = 1, 2  # what a seed is for, beside the crop


class ShardError(ValueError):
    """A shard, an index or the manifest is missing or altered; the message says which, and what to do."""


class Batch(NamedTuple):
    """Images of one rank at one step."""

    images: Tensor
    """(B, 3, H, W) float32, normalised."""
    labels: Tensor
    """(B,) int64."""
    rows: Tensor
    """(B,) int64, rows of the split's index: `IndexedImages.keys(rows)` names the images."""
    seed: int
    """Seed of the global batch, for `augment.batch_transform`."""


class Shards:
    """A folder of shards that is complete: every file in its manifest is there, with its size.

    Contents are compared with their hashes by `pipeline.shard.verify`, which takes longer.
    Raises: ShardError, naming the file.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            raise ShardError(f"{path} not found: run `dvc repro shard` to write the shards") from None
        except ValueError:
            raise ShardError(f"{path} is not valid JSON: {remedy(path)}") from None
        for name, entry in self.files.items():
            path = self.folder / name
            if not path.is_file():
                raise ShardError(f"{path} is in the manifest but missing: run `dvc repro shard` to write it")
            size = path.stat().st_size
            if size != entry["size"]:
                sizes = f"{size} bytes, not {entry['size']}"
                raise ShardError(f"{path} does not match its manifest ({sizes}): {remedy(path)}")

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Tars and indices: name -> size in bytes and sha256."""
        return self.manifest["shards"] | self.manifest["indices"]

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the labels."""
        return self.manifest["classes"]

    @property
    def num_classes(self) -> int:
        """Classes, and so outputs of a model."""
        return len(self.classes)

    def num_images(self, split: str) -> int:
        """Images of `train` or `val`."""
        return self.manifest["counts"][split]


def remedy(path: Path) -> str:
    """What to do about a damaged file of the shards."""
    return f"delete {path} and run `dvc repro shard`"


class IndexedImages(Dataset):
    """One split as a map-style data set: `images[row]` is (uint8 (3, H, W), label), in the index's order.

    Reads by offset from descriptors that stay open, so processes may fork or be spawned at any time.
    Raises: ShardError for a JPEG that does not decode.
    """

    def __init__(self, shards: Shards | Path | str, split: str) -> None:
        self.shards = shards if isinstance(shards, Shards) else Shards(shards)
        self.split = split
        index = pq.read_table(self.shards.folder / f"{split}.index.parquet", read_dictionary=["shard"])
        shard = index["shard"].combine_chunks()
        self._key = index["key"]
        self._names: list[str] = shard.dictionary.to_pylist()
        self._shard = shard.indices.to_numpy()
        self._offset = index["offset"].to_numpy()
        self._size = index["size"].to_numpy()
        self.labels = torch.from_numpy(index["label"].to_numpy().copy())
        """(num_images,) int64."""

    def __len__(self) -> int:
        return len(self._size)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        jpeg = torch.frombuffer(bytearray(self.jpeg(row)), dtype=torch.uint8)
        try:  # deprecated by torchvision; PIL's takes 1.5 (photos) to 2.2 (digits) times as long (1 core)
            image = decode_jpeg(jpeg, mode=ImageReadMode.RGB)
        except RuntimeError as error:
            path = self.shards.folder / self._names[self._shard[row]]
            (key,) = self.keys([row])
            raise ShardError(f"{key} in {path} does not decode ({error}): {remedy(path)}") from None
        return cast(Tensor, image), int(self.labels[row])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_descriptors"}

    def jpeg(self, row: int) -> bytes:
        """The JPEG as it lies in the tar."""
        descriptor = self._descriptors[self._shard[row]]
        return os.pread(descriptor, int(self._size[row]), int(self._offset[row]))

    def keys(self, rows: Sequence[int] | Tensor) -> list[str]:
        """Keys of the images in the tars, `<split>/<class>/<name>`, for people."""
        return [self._key[int(row)].as_py() for row in rows]

    @cached_property
    def _descriptors(self) -> list[int]:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = len(self._names) + 512
        if soft < needed:  # 1,024 is a common limit, and ImageNet has as many shards
            with contextlib.suppress(ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, hard), hard))
        return [os.open(self.shards.folder / name, os.O_RDONLY) for name in self._names]

    def __del__(self) -> None:
        for descriptor in self.__dict__.pop("_descriptors", ()):
            os.close(descriptor)


def epoch_order(num: int, *, seed: int, epoch: int) -> Tensor:
    """(num,) int64: a permutation of the rows, new in every epoch."""
    generator = torch.Generator().manual_seed(augment.fold(seed, epoch))
    return torch.randperm(num, generator=generator)


def steps_per_epoch(num: int, global_batch_size: int) -> int:
    """Global batches of a training epoch; the last incomplete one is dropped.

    Raises: ValueError if not even one is complete.
    """
    if num < global_batch_size:
        raise ValueError(f"a global batch of {global_batch_size} needs more than the {num} training images")
    return num // global_batch_size


def train_batches(
    images: IndexedImages, recipe: Recipe, data: Data, *, seed: int, epoch: int, rank: int = 0,
    world_size: int = 1, start_step: int = 0, loader_workers: int = 0, device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """This rank's part of every global batch of an epoch from `start_step` on, augmented.

    Raises: ValueError if the global batch does not divide among the ranks, or the data does not fill one.
    """
    size = recipe.global_batch_size
    if size % world_size:
        raise ValueError(f"global_batch_size {size} does not divide among {world_size} workers")
    share = size // world_size
    order = epoch_order(len(images), seed=seed, epoch=epoch)
    steps = range(start_step, steps_per_epoch(len(images), size))
    places = [range(step * size + rank * share, step * size + (rank + 1) * share) for step in steps]
    fetch = _Fetch(images, augment.train_transform(recipe, data), order, seed=augment.fold(seed, epoch))
    normalize, erase = augment.Normalize(data, device), augment.Erase(recipe)
    fetched = _load(fetch, places, loader_workers, device)
    for step, part, (pixels, labels) in zip(steps, places, fetched, strict=True):
        inputs = normalize(pixels)
        if recipe.random_erasing:
            erase(inputs, (augment.fold(fetch.seed, place, _ERASING) for place in part))
        labels = labels.to(device, non_blocking=True)
        yield Batch(inputs, labels, order[part.start : part.stop], augment.fold(fetch.seed, step, _MIXING))


def val_batches(
    images: IndexedImages, recipe: Recipe, data: Data, *, batch_size: int, rank: int = 0, world_size: int = 1,
    loader_workers: int = 0, device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Every image of the split exactly once over the ranks, in the index's order, `batch_size` at a time.

    Ranks may get unequal numbers of batches, or none: collective calls belong behind the loop.
    """
    num = len(images)
    first, last = (num * part // world_size for part in (rank, rank + 1))
    places = [range(start, min(start + batch_size, last)) for start in range(first, last, batch_size)]
    fetch = _Fetch(images, augment.eval_transform(recipe, data), torch.arange(num), seed=0)
    normalize = augment.Normalize(data, device)
    for part, (pixels, labels) in zip(places, _load(fetch, places, loader_workers, device), strict=True):
        labels = labels.to(device, non_blocking=True)
        yield Batch(normalize(pixels), labels, fetch.order[part.start : part.stop], 0)


class _Fetch(Dataset):
    """places -> (uint8 (B, 3, H, W), labels (B,)), each image with the generators set for its place."""

    def __init__(self, images: IndexedImages, transform: v2.Compose, order: Tensor, *, seed: int) -> None:
        self.images, self.transform, self.order, self.seed = images, transform, order, seed

    def __getitem__(self, places: range) -> tuple[Tensor, Tensor]:
        rows = self.order[places.start : places.stop]
        pixels = []
        with augment.borrowed_generators():
            for place, row in zip(places, rows.tolist(), strict=True):
                augment.reseed(augment.fold(self.seed, place))
                pixels.append(self.transform(self.images[row][0]))
        return torch.stack(pixels), self.images.labels[rows]


def _load(
    fetch: _Fetch, places: list[range], loader_workers: int, device: torch.device | str
) -> Iterator[tuple[Tensor, Tensor]]:
    if not loader_workers:
        return (fetch[part] for part in places)
    return iter(DataLoader(
        fetch, batch_size=None, sampler=places, num_workers=loader_workers, prefetch_factor=_FETCHED_AHEAD,
        pin_memory=torch.device(device).type == "cuda",
    ))
