"""Passes the workers' reports from Ray's controller to the driver, through a file.

Ray starts the controller on the driver's node, so both can read the file. The controller imports no other module of
ours: that saves it from importing torch and timm, which takes seconds at every start.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ray.train import UserCallback

EAGER_WARNING = (
    "train.compile is set, but a worker's machine has no C++ compiler, no Python headers or, on a GPU, no Triton: it "
    "trains eagerly"
)

_POLL_S = 0.2


class ReportLog(UserCallback):
    """Writes the reports of rank 0 and the errors of failed ranks to an existing file, one JSON object per line.

    The controller outlives a driver that is interrupted. What it has to say then, to a file that is gone, is lost.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self._write(metrics[0])

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._write({"failed": {rank: _summarize_error(error) for rank, error in sorted(worker_exceptions.items())}})

    def _write(self, entry: dict[str, Any]) -> None:
        with suppress(FileNotFoundError), self.path.open("r+") as file:
            file.seek(0, os.SEEK_END)
            file.write(json.dumps(entry) + "\n")


def _summarize_error(error: Exception) -> str:
    """Returns the first sentence of the error's last line. Ray's own errors are pages long."""
    *_, last = str(error).strip().splitlines() or [type(error).__name__]
    return last.partition(". ")[0]


@contextmanager
def follow_reports(path: Path, on_entry: Callable[[dict[str, Any]], None]) -> Iterator[ReportLog]:
    """Creates a report log and a thread that calls `on_entry` with every entry before the context ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    ended = threading.Event()

    def read_lines() -> None:
        with path.open() as file:
            last = False
            while not last:
                last = ended.wait(_POLL_S)
                for line in file:
                    on_entry(json.loads(line))

    reader = threading.Thread(target=read_lines, daemon=True)
    reader.start()
    try:
        yield ReportLog(path)
    finally:
        ended.set()
        reader.join()
        path.unlink(missing_ok=True)
