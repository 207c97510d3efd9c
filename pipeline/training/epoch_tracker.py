"""Sends what workers report to MLflow, in a thread: a slow or failing server delays neither console nor training."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

logger = logging.getLogger(__name__)


class EpochTracker:
    """Logs epochs and steps of a run. What MLflow misses is logged with what comes next, or when the context ends."""

    def __init__(self, run_name: str, log: Callable[[list[dict[str, Any]], list[dict[str, Any]]], None]) -> None:
        """Args: log: logs rows of epochs and of steps; called in the thread."""
        self._run_name, self._log = run_name, log
        self._epochs: list[dict[str, Any]] = []
        self._steps: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tracking")
        self._running: Future[None] | None = None

    def __enter__(self) -> EpochTracker:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        if self._epochs or self._steps:
            self._flush()

    def add(self, entry: dict[str, Any]) -> None:
        """Takes a report with an epoch, with `steps`, or with both. Returns at once."""
        entry = dict(entry)
        with self._lock:
            self._steps += entry.pop("steps", ())
            if "epoch" in entry:
                self._epochs.append(entry)
            if self._running is None or self._running.done():  # otherwise, what comes next takes this with it
                self._running = self._thread.submit(self._flush)

    def _flush(self) -> None:
        with self._lock:
            epochs, steps = list(self._epochs), list(self._steps)
        try:
            self._log(epochs, steps)
        except Exception as error:  # of MLflow, of its database or of HTTP, which must not end the training
            logger.warning("MLflow misses numbers of %s until later: %s", self._run_name, error)
            return
        with self._lock:
            del self._epochs[: len(epochs)], self._steps[: len(steps)]
