"""Reads, decodes and augments batches on request, in loader processes or in this one.

The processes start with the first request and serve all splits and epochs. So each of them opens a shard once, keeps
its connections and its node's cache, and imports nothing again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline.base.errors import ShardError, SourceError
from pipeline.loading import augment
from pipeline.loading.datasets import ImageDataset

PREFETCH_FACTOR = 4  # batches that each loader process prepares in advance

ERASING_STREAM, MIXUP_STREAM = 1, 2  # distinguishes seeds for erasing and mixup from those for the crop


class BatchRequest(NamedTuple):
    """The images of a batch and the seed of their augmentation. Small, because it goes to a loader process."""

    split: str
    positions: range
    """Positions in the order of the epoch. The augmentation of an image depends on its position and on `seed`."""
    rows: list[int]
    """Rows in the index of the split."""
    seed: int


class DecodedBatch(NamedTuple):
    """A batch on the CPU, in pinned memory if a process decoded it for a GPU."""

    pixels: Tensor
    """(B, 3, H, W) uint8, augmented, with the channels innermost in memory."""
    labels: Tensor
    """(B,) int64."""
    patches: augment.ErasedPatches | None
    """What random erasing replaces; None without random erasing."""


class BatchDecoder:
    """Decodes and augments batches of one split.

    Args:
        erasing: draws what random erasing replaces.
    """

    def __init__(
        self,
        images: ImageDataset,
        transform: Callable[[Tensor], Tensor],
        erasing: augment.RandomErasingSampler | None = None,
    ) -> None:
        self.images, self.transform, self.erasing = images, transform, erasing

    def decode(self, request: BatchRequest) -> DecodedBatch:
        """Raises: ShardError or SourceError, naming the image, if it cannot be read or decoded."""
        jpegs = self.images.read_jpegs(request.rows)
        pixels_BHWC = []
        with augment.preserve_rng_state():
            for position, row, jpeg in zip(request.positions, request.rows, jpegs, strict=True):
                augment.seed_generators(augment.derive_seed(request.seed, position))
                pixels_BHWC.append(self.transform(self.images.decode(row, jpeg)).permute(1, 2, 0))
        seeds = (augment.derive_seed(request.seed, position, ERASING_STREAM) for position in request.positions)
        return DecodedBatch(
            torch.stack(pixels_BHWC).permute(0, 3, 1, 2),
            self.images.labels[request.rows],
            None if self.erasing is None else self.erasing(seeds),
        )


class Loader:
    """Decodes batches in the order of their requests, ahead of time if there are loader processes.

    Args:
        workers: number of processes. 0 decodes in this process, when a batch is taken.
    """

    def __init__(
        self, decoders: Mapping[str, BatchDecoder], *, workers: int, device: torch.device | str = "cpu"
    ) -> None:
        self._decoders = decoders
        self._requests = _Requests()
        self._processes = (
            None
            if not workers
            else DataLoader(
                _WorkerDataset(decoders),
                batch_size=None,
                sampler=self._requests,
                num_workers=workers,
                prefetch_factor=PREFETCH_FACTOR,
                persistent_workers=True,
                pin_memory=torch.device(device).type == "cuda",
                generator=torch.Generator(),  # otherwise it draws an unused seed from the global generator
            )
        )

    def load(self, requests: Iterable[BatchRequest]) -> Iterator[DecodedBatch]:
        """Yields the batch of each request. A new call gives up what an earlier one has not yielded yet.

        Raises: ShardError or SourceError, naming the image, if it cannot be read or decoded.
        """
        if self._processes is None:
            yield from (self._decoders[request.split].decode(request) for request in requests)
            return
        self._requests.current = requests
        for decoded in self._processes:
            if isinstance(decoded, ValueError):
                raise decoded
            yield decoded

    def close(self) -> None:
        """Ends the processes."""
        iterator = getattr(self._processes, "_iterator", None)  # without it, they would end with the last traceback
        if iterator is not None:
            iterator._shutdown_workers()
        self._processes = None


class _Requests(Sampler):
    """The requests that the processes are to serve next, read anew at the start of each iteration."""

    def __init__(self) -> None:
        self.current: Iterable[BatchRequest] = ()

    def __iter__(self) -> Iterator[BatchRequest]:
        return iter(self.current)


class _WorkerDataset(Dataset):
    """The decoders in a loader process. Errors are returned as values: torch would wrap them in a traceback."""

    def __init__(self, decoders: Mapping[str, BatchDecoder]) -> None:
        self.decoders = decoders

    def __getitem__(self, request: BatchRequest) -> DecodedBatch | ValueError:
        try:
            return self.decoders[request.split].decode(request)
        except (ShardError, SourceError) as error:
            return error
