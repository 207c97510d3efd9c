"""Numbers from a device, and how long it has nothing to do, without making the training thread wait for it.

On CUDA, kernels run after the call that queues them. Reading a result, or copying to or from ordinary memory, waits
until all queued kernels are done, and then the device has nothing to do until more are queued. What is read here was
queued a step earlier, and comes through pinned memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class HostCopy:
    """A small tensor on its way to the host."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)  # from torch's own pool
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> Any:
        """Returns the values, as `Tensor.tolist`. Waits for what was queued before the copy, and not for more."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


class DataWait:
    """Measures how long a device has nothing to do because the next batch is not there.

    The wait for a batch is the time that its iterator takes, but on CUDA at most the time between the device's last
    kernel before and its first one after: while the device still computes, waiting costs nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._device = device
        self._seconds = 0.0
        self._pending: list[tuple[float, Any, Any]] = []
        """Waits whose kernels may not have run yet: seconds on the host, events before and after."""

    def measure(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields the batches."""
        iterator = iter(batches)
        while True:
            before, started = self._record_event(), time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            seconds = time.perf_counter() - started
            if self._on_cuda:
                self._pending.append((seconds, before, self._record_event()))
                self._settle()
            else:
                self._seconds += seconds
            yield batch

    @property
    def seconds(self) -> float:
        """The sum so far. Exact once the device has nothing queued."""
        self._settle()
        return self._seconds

    def largest_s(self, all_reduce: Callable[[Tensor], Tensor], rank: int, world_size: int) -> float:
        """Returns the largest sum of all workers: they all wait for the last one. Every worker calls it."""
        by_rank = torch.zeros(world_size, dtype=torch.float64, device=self._device)
        by_rank[rank].fill_(self.seconds)
        return all_reduce(by_rank).max().item()

    def _record_event(self) -> Any:
        if not self._on_cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _settle(self) -> None:
        """Adds the waits whose kernels have run."""
        while self._pending and self._pending[0][2].query():
            seconds, before, after = self._pending.pop(0)
            self._seconds += min(seconds, before.elapsed_time(after) / 1000)
