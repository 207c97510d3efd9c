"""Numbers of single steps, at a bounded rate: loss, norm of the gradient, wait for data, memory of the GPU."""

from __future__ import annotations

import time
from typing import Any

import torch

INTERVAL_S = 10.0
"""Least time between two steps that are logged: a training of a week has 60,000 rows at most."""


class StepLog:
    """Collects the numbers of a step every few seconds, until they are reported."""

    def __init__(self, device: torch.device, interval_s: float = INTERVAL_S) -> None:
        self._device, self._interval_s = device, interval_s
        self._last, self._last_wait_s = time.perf_counter(), 0.0
        self._rows: list[dict[str, Any]] = []

    def is_due(self) -> bool:
        """Whether the numbers of the next step are wanted."""
        return time.perf_counter() - self._last >= self._interval_s

    def add(self, step: int, *, loss: float, grad_norm: float, wait_s: float, loss_scale: float | None) -> None:
        """Adds a step.

        Args:
            grad_norm: norm of the whole gradient, before it is clipped.
            wait_s: time since the start of the epoch that the device had no batch.
            loss_scale: None if the loss is not scaled.
        """
        now = time.perf_counter()
        waited = wait_s - self._last_wait_s if wait_s >= self._last_wait_s else wait_s  # a new epoch starts at 0
        row = {"step": step, "train/step_loss": loss, "train/grad_norm": grad_norm}
        row["perf/step_data_wait_pct"] = 100 * waited / (now - self._last)
        if loss_scale is not None:
            row["train/loss_scale"] = loss_scale
        if self._device.type == "cuda":  # torch counts what it allocates: the device is not asked
            row["perf/gpu_mem_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        self._last, self._last_wait_s = now, wait_s
        self._rows.append(row)

    def take(self) -> list[dict[str, Any]]:
        """Returns the rows that were added since the last call."""
        rows, self._rows = self._rows, []
        return rows
