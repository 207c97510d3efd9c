"""How far a long pass over many files has come: a bar on a terminal, elsewhere a line in the log now and then."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_LOG_EVERY_S = 30.0


class Advance(Protocol):
    """Tells what was done since the last call."""

    def __call__(self, *, images: int = 0, num_bytes: int = 0) -> None: ...


@contextmanager
def progress(doing: str, total_bytes: int) -> Iterator[Advance]:
    """Shows `doing`, MB done and in all, MB/s, images and the time left, by what the block tells it."""
    with _bar(doing, total_bytes) if sys.stderr.isatty() else _lines(doing, total_bytes) as advance:
        yield advance


@contextmanager
def _bar(doing: str, total_bytes: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TextColumn("{task.fields[images]:,} images"), TimeRemainingColumn(),
    )
    num_images = 0
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(doing, total=total_bytes, images=0)

        def advance(*, images: int = 0, num_bytes: int = 0) -> None:
            nonlocal num_images
            num_images += images
            bar.update(task, advance=num_bytes, images=num_images)

        yield advance


@contextmanager
def _lines(doing: str, total_bytes: int) -> Iterator[Advance]:
    started = logged = time.monotonic()
    done = num_images = 0

    def advance(*, images: int = 0, num_bytes: int = 0) -> None:
        nonlocal done, num_images, logged
        done, num_images = done + num_bytes, num_images + images
        now = time.monotonic()
        if now - logged < _LOG_EVERY_S or not done:
            return
        logged = now
        rate = done / (now - started)
        logging.info("%s: %d of %d MB, %d images, %.0f MB/s, %.0f min left", doing, done // 10**6,
                     total_bytes // 10**6, num_images, rate / 1e6, (total_bytes - done) / rate / 60)

    yield advance
