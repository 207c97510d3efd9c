"""Reading the shards through their index: any order, every image once, resumable anywhere.

Order is a pure function of (seed, epoch, rank, world size). Global batch b of an epoch holds the places
[b G, (b+1) G) of the epoch's order, and rank r takes its contiguous r-th part of each, in whole mixup groups. What is
random in an image follows its place, what is random in a group follows the group's (pipeline/augment.py), so any
world size, and a resumed run, sees the same pixels.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline import augment
from pipeline.config import Data, Recipe
from pipeline.decode import decode
from pipeline.sources import SourceError
from pipeline.store import DAMAGED, Part, ShardError, is_url, open_store, read_manifest

_FETCHED_AHEAD = 4  # batches that each loader process prepares in advance
_ERASING, _MIXING = 1, 2  # what a seed is for, beside the crop
_HEADER = tarfile.BLOCKSIZE  # bytes: the last block before a member's content names it
_CUT = 99  # bytes of a name that fit into that block; longer ones stand in blocks before it


class Batch(NamedTuple):
    """Images that one rank takes at once: its part of a global batch, or a piece of that part."""

    images: Tensor
    """(B, 3, H, W) float32, normalised."""
    labels: Tensor
    """(B,) int64."""
    rows: Tensor
    """(B,) int64, rows of the split's index: `IndexedImages.keys(rows)` names the images."""
    seeds: tuple[int, ...] = ()
    """One for each group of `mixup_group` images, for `augment.batch_transform`."""
    ends_step: bool = True
    """Whether it is the last piece of this rank's part of the global batch."""


class Shards:
    """A folder of shards that is complete: every file in its manifest is there, with its size.

    The tars lie beside the manifest, or where its `location` says: a folder (relative to the manifest's) or an
    fsspec URL. Contents are compared with their hashes by pipeline/verify.py, which takes longer.

    Args:
        cache_gib: bound of this node's copies of shards at a URL, in GiB; 0: none are made.
    Raises: ShardError, naming the file.
    """

    def __init__(self, folder: Path | str, *, cache_gib: float = 0) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        open_store(self.folder, self.manifest["indices"]).check()
        location = self.manifest["location"] or "."
        self.store = open_store(
            location if is_url(location) else self.folder / location, self.manifest["shards"], cache_gib=cache_gib
        )
        self.store.check()

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the labels."""
        return self.manifest["classes"]

    @property
    def num_classes(self) -> int:
        """Classes, and so outputs of a model."""
        return len(self.classes)

    @property
    def fingerprint(self) -> str:
        """A hash of what training can see of the shards: classes, images and their order, wherever they lie."""
        seen = {key: self.manifest[key] for key in ("classes", "counts", "indices", "shards")}
        return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()

    def num_images(self, split: str) -> int:
        """Images of `train` or `val`."""
        return self.manifest["counts"][split]


class Images(Protocol):
    """What a split's images do to be batched."""

    labels: Tensor
    """(num_images,) int64."""

    def __len__(self) -> int: ...

    def jpegs(self, rows: Sequence[int]) -> list[bytes]:
        """The encoded images of those rows."""
        ...

    def decode(self, row: int, jpeg: bytes) -> Tensor:
        """uint8 (3, H, W) of one. Raises: ShardError or SourceError, naming it."""
        ...


class IndexedImages(Dataset):
    """One split as a map-style data set: `images[row]` is (uint8 (3, H, W), label), in the index's order.

    Any sampler of torch's or timm's may choose the rows; a DataLoader reads each batch of them in one go. It can be
    forked and pickled at any time.

    Args:
        transform: what samplers' users do to each image; None: nothing. `train_batches` has its own.
    Raises: ShardError where a shard holds something else than the index says, or an image does not decode.
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
            for row, jpeg, label in zip(rows, self.jpegs(rows), self.labels[rows].tolist(), strict=True)
        ]

    def jpegs(self, rows: Sequence[int]) -> list[bytes]:
        """The JPEGs as they lie in the tars, each with the tar header before it compared with the index."""
        parts = [
            Part(self._names[self._shard[row]], int(self._offset[row]) - _HEADER, int(self._size[row]) + _HEADER)
            for row in rows
        ]
        contents = self.shards.store.read_all(parts)
        for row, content in zip(rows, contents, strict=True):
            self._compare(row, content[:_HEADER])
        return [content[_HEADER:] for content in contents]

    def decode(self, row: int, jpeg: bytes) -> Tensor:
        """uint8 (3, H, W) of the JPEG of that row."""
        try:
            return decode(jpeg)
        except ValueError as error:
            (key,) = self.keys([row])
            raise ShardError(f"{self._where(row)}: {key} does not decode ({error}): {DAMAGED}") from None

    def keys(self, rows: Sequence[int] | Tensor) -> list[str]:
        """Keys of the images in the tars, `<split>/<class>/<name>`, for people."""
        return [self._key[int(row)].as_py() for row in rows]

    def _compare(self, row: int, header: bytes) -> None:
        """Raises ShardError unless this is the tar header of the row's image."""
        (key,), size = self.keys([row]), self._size[row]
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            found = "no header of a tar's member"
        else:
            if member.size == size and _is_of(member.name, key):
                return
            found = f"{member.name} of {member.size} bytes"
        expected = f"the index expects {key} of {size} bytes at byte {self._offset[row]}"
        raise ShardError(f"{self._where(row)}: {expected}, found {found}: {DAMAGED}")

    def _where(self, row: int) -> str:
        return self.shards.store.where(self._names[self._shard[row]])


def _is_of(name: str, key: str) -> bool:
    """Whether a tar header's name is that of a key's JPEG, as far as the header holds it."""
    header = name.encode("utf-8", "surrogateescape")
    # What is not ASCII is replaced where a PAX header holds the name itself.
    forms = (f"{key}.".encode(), f"{key}.".encode("ascii", "replace"))
    return any(header.startswith(form) or len(header) >= _CUT and form.startswith(header) for form in forms)


def epoch_order(num: int, *, seed: int, epoch: int, copies: int = 1, global_batch_size: int = 1) -> Tensor:
    """(num,) int64, the rows of an epoch in their order: a permutation, new in every epoch, if `copies` is 1.

    Repeated augmentation (Hoffer et al. 2020; Berman et al. 2019): otherwise each of the first num / copies images
    of the permutation comes `copies` times, in one global batch unless a batch ends between them. A batch holds all
    first copies, then all second ones, and so on: an image's copies are at least G // copies places apart, and so
    neither in one group of mixup nor on the same one of `copies` or more equal ranks.
    """
    generator = torch.Generator().manual_seed(augment.fold(seed, epoch))
    order = torch.randperm(num, generator=generator)
    if copies == 1:
        return order
    place = torch.arange(num)
    by_copy = (place // global_batch_size * copies + place % copies).argsort(stable=True)
    return order[by_copy // copies]


def steps_per_epoch(num: int, global_batch_size: int) -> int:
    """Global batches of a training epoch; the last incomplete one is dropped.

    Raises: ValueError if not even one is complete.
    """
    if num < global_batch_size:
        raise ValueError(f"a global batch of {global_batch_size} needs more than the {num} training images")
    return num // global_batch_size


def train_batches(
    images: Images, recipe: Recipe, data: Data, *, seed: int, epoch: int, rank: int = 0,
    world_size: int = 1, start_step: int = 0, batch_size: int | None = None, loader_workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """This rank's part of every global batch of an epoch from `start_step` on, augmented, `batch_size` at a time.

    A global batch is divided in whole groups of `mixup_group` images, so that ranks may get unequal numbers of them.

    Args:
        batch_size: images at once, a multiple of `mixup_group`; None: the whole part.
    Raises: ValueError for a batch that is not made of whole groups, for more ranks than groups, for copies of an image
        that would share a group, or if the data does not fill a global batch.
    """
    size, group, copies = recipe.global_batch_size, recipe.mixup_group, recipe.repeated_augmentation
    num_groups = size // group
    if size % group or (batch_size or group) % group:
        raise ValueError(f"batches of {size} and {batch_size} images are not made of whole groups of {group}")
    if world_size > num_groups:
        raise ValueError(f"a global batch of {num_groups} groups does not divide among {world_size} workers")
    if copies > 1 and group > size // copies:
        raise ValueError(f"groups of {group} images in a global batch of {size} hold several of {copies} copies")
    order = epoch_order(len(images), seed=seed, epoch=epoch, copies=copies, global_batch_size=size)
    first, last = (num_groups * part // world_size * group for part in (rank, rank + 1))
    at_once = batch_size or last - first
    places = [
        range(step * size + start, step * size + min(start + at_once, last))
        for step in range(start_step, steps_per_epoch(len(images), size)) for start in range(first, last, at_once)
    ]
    fetch = Fetch(images, augment.train_transform(recipe, data), order, seed=augment.fold(seed, epoch))
    normalize, erase = augment.Normalize(data, device), augment.Erase(recipe)
    for part, (pixels, labels) in zip(places, _load(fetch, places, loader_workers, device), strict=True):
        inputs = normalize(pixels)
        if recipe.random_erasing:
            erase(inputs, (augment.fold(fetch.seed, place, _ERASING) for place in part))
        yield Batch(
            inputs,
            labels.to(device, non_blocking=True),
            order[part.start : part.stop],
            tuple(augment.fold(fetch.seed, place, _MIXING) for place in part[::group]),
            part.stop % size == last % size,
        )


def val_batches(
    images: Images, recipe: Recipe, data: Data, *, batch_size: int, rank: int = 0, world_size: int = 1,
    loader_workers: int = 0, device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Every image of the split exactly once over the ranks, in the index's order, `batch_size` at a time.

    Ranks may get unequal numbers of batches, or none: collective calls belong behind the loop.
    """
    num = len(images)
    first, last = (num * part // world_size for part in (rank, rank + 1))
    places = [range(start, min(start + batch_size, last)) for start in range(first, last, batch_size)]
    fetch = Fetch(images, augment.eval_transform(recipe, data), torch.arange(num), seed=0)
    normalize = augment.Normalize(data, device)
    for part, (pixels, labels) in zip(places, _load(fetch, places, loader_workers, device), strict=True):
        labels = labels.to(device, non_blocking=True)
        yield Batch(normalize(pixels), labels, fetch.order[part.start : part.stop])


class Fetch(Dataset):
    """places -> (uint8 (B, 3, H, W), labels (B,)), each image with the generators set for its place."""

    def __init__(
        self, images: Images, transform: Callable[[Tensor], Tensor], order: Tensor, *, seed: int
    ) -> None:
        self.images, self.transform, self.order, self.seed = images, transform, order, seed

    def __getitem__(self, places: range) -> tuple[Tensor, Tensor]:
        rows = self.order[places.start : places.stop]
        jpegs = self.images.jpegs(rows.tolist())
        pixels_BHWC = []
        with augment.borrowed_generators():
            for place, row, jpeg in zip(places, rows.tolist(), jpegs, strict=True):
                augment.reseed(augment.fold(self.seed, place))
                pixels_BHWC.append(self.transform(self.images.decode(row, jpeg)).permute(1, 2, 0))
        return torch.stack(pixels_BHWC).permute(0, 3, 1, 2), self.images.labels[rows]


class _Elsewhere(Dataset):
    """A Fetch in another process, where errors are values: torch would bury their message in a traceback."""

    def __init__(self, fetch: Fetch) -> None:
        self.fetch = fetch

    def __getitem__(self, places: range) -> tuple[Tensor, Tensor] | ValueError:
        try:
            return self.fetch[places]
        except (ShardError, SourceError) as error:
            return error


def _load(
    fetch: Fetch, places: list[range], loader_workers: int, device: torch.device | str
) -> Iterator[tuple[Tensor, Tensor]]:
    if not loader_workers:
        yield from (fetch[part] for part in places)
        return
    for fetched in DataLoader(
        _Elsewhere(fetch), batch_size=None, sampler=places, num_workers=loader_workers,
        prefetch_factor=_FETCHED_AHEAD, pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator(),  # else it draws a seed, which nothing here uses, from the global one
    ):
        if isinstance(fetched, ValueError):
            raise fetched
        yield fetched
