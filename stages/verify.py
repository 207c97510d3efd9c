"""`make verify`: compares every shard and index with its checksum, and lists missing or damaged ones."""

from __future__ import annotations

import logging

from pipeline.base import config
from stages import run_stage


def run() -> None:
    """Exits with status 2 and says what to do if a file does not match."""
    folder = config.load_experiment().data.shards

    from pipeline.shards import verify

    verify.verify_all(folder)
    logging.info("%s: every file is as it was written", folder)


if __name__ == "__main__":
    run_stage(run)
