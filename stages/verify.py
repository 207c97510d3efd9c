"""`make verify`: compares every shard and index with its checksum, and lists what is missing or damaged."""

from __future__ import annotations

import logging

from pipeline import config
from stages import main


def run() -> None:
    """Ends with status 2, and what to do, where a file is not as it was written."""
    folder = config.load().data.shards

    from pipeline import verify

    verify.verify(folder)
    logging.info("%s: every file is as it was written", folder)


if __name__ == "__main__":
    main(run)
