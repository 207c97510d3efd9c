"""What Ray's controller hears of the workers, on its way to the driver, which waits for the training to end.

Ray starts the controller on the driver's node, so that a file will do. This module is all of ours that the
controller imports: kept apart, it spares that process torch and timm, seconds of every start.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.train import UserCallback

_POLL_S = 0.2


class Journal(UserCallback):
    """Writes what rank 0 reports, and which ranks failed, as lines of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self._write(metrics[0])

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._write({"failed": {rank: _in_brief(error) for rank, error in sorted(worker_exceptions.items())}})

    def _write(self, entry: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def _in_brief(error: Exception) -> str:
    """The first sentence of Ray's own errors, which are pages; the last line of others, where their message is."""
    *_, last = str(error).strip().splitlines() or [type(error).__name__]
    return last.partition(". ")[0]


@contextmanager
def following(path: Path, tell: Callable[[dict[str, Any]], None]) -> Iterator[Journal]:
    """A journal there, and a thread that tells every line written to it; all are told when the context ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    ended = threading.Event()

    def follow() -> None:
        with path.open() as file:
            last = False
            while not last:
                last = ended.wait(_POLL_S)
                for line in file:
                    tell(json.loads(line))

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield Journal(path)
    finally:
        ended.set()
        follower.join()
        path.unlink(missing_ok=True)
