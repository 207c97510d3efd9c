"""The epochs' way from Ray's controller to the driver, while the driver waits for the training to end.

Ray starts the controller on the driver's node, so that a file will do. This module is all of ours that the
controller imports: kept apart, it spares that process torch and timm, seconds of every start.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.train import UserCallback

_POLL_S = 0.2


class Journal(UserCallback):
    """Writes what rank 0 reports as a line of a file, once Ray has committed the checkpoint that goes with it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(metrics[0]) + "\n")


@contextmanager
def following(tell: Callable[[dict[str, Any]], None]) -> Iterator[Journal]:
    """A journal, and a thread that tells every line written to it; all are told when the context ends."""
    with tempfile.TemporaryDirectory() as folder:
        path, ended = Path(folder, "epochs.jsonl"), threading.Event()
        path.touch()

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
