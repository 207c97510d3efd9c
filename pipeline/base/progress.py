"""Progress of a long pass over many files: a progress bar on a terminal, otherwise a log line every 30 s."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_LOG_INTERVAL_S = 30.0


class ProgressCallback(Protocol):
    """Reports the images and bytes that were processed since the last call."""

    def __call__(self, *, images: int = 0, num_bytes: int = 0) -> None: ...


@contextmanager
def progress_bar(description: str, total_bytes: int) -> Iterator[ProgressCallback]:
    """Context manager that yields a callback and shows MB processed and in total, images, MB/s and the time left."""
    show = _terminal_progress if sys.stderr.isatty() else _log_progress
    with show(description, total_bytes) as advance:
        yield advance


@contextmanager
def _terminal_progress(description: str, total_bytes: int) -> Iterator[ProgressCallback]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[images]:,} images"),
        TimeRemainingColumn(),
    )
    num_images = 0
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total_bytes, images=0)

        def advance(*, images: int = 0, num_bytes: int = 0) -> None:
            nonlocal num_images
            num_images += images
            bar.update(task, advance=num_bytes, images=num_images)

        yield advance


@contextmanager
def _log_progress(description: str, total_bytes: int) -> Iterator[ProgressCallback]:
    started = logged = time.monotonic()
    done = num_images = 0

    def advance(*, images: int = 0, num_bytes: int = 0) -> None:
        nonlocal done, num_images, logged
        done, num_images = done + num_bytes, num_images + images
        now = time.monotonic()
        if now - logged < _LOG_INTERVAL_S or not done:
            return
        logged = now
        rate = done / (now - started)
        logging.info(
            "%s: %d of %d MB, %d images, %.0f MB/s, %.0f min left",
            description,
            done // 10**6,
            total_bytes // 10**6,
            num_images,
            rate / 1e6,
            (total_bytes - done) / rate / 60,
        )

    yield advance
