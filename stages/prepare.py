"""Prepares the source images: writes the digits, or summarizes data.source.

The digits are scikit-learn's (1,797 of 8x8 grey pixels; Alpaydin and Kaynak, UCI ML repository, 1998), as
32x32 RGB JPEGs in `{train,val}/<class>/`. The out that DVC tracks is a summary, `data/source.json`. DVC
therefore neither caches nor deletes the images, which may be many and belong to the user.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from pipeline.base import config
from pipeline.packing.sources.detect import ExistingShards, Source
from pipeline.packing.sources.digits import open_source
from stages import run_stage

SUMMARY_FILE = Path("data/source.json")


def run() -> None:
    data = config.load_experiment().data
    source = open_source(data)
    found = summarize_source(source)
    SUMMARY_FILE.parent.mkdir(parents=True, exist_ok=True)
    SUMMARY_FILE.write_text(json.dumps(found, indent=1) + "\n")
    logging.info(f"{data.source}: {found['layout']}, {found['files']:,} files, {found['bytes'] / 1e6:,.1f} MB")


def summarize_source(source: Source | ExistingShards) -> dict[str, Any]:
    """Returns the layout, number and bytes of the files, and a hash of their names and sizes."""
    files = sorted(source.list_files())
    digest = hashlib.sha256()
    for name, size in files:
        digest.update(f"{name}\t{size}\n".encode(errors="surrogateescape"))
    return {
        "layout": source.layout,
        "files": len(files),
        "bytes": sum(size for _, size in files),
        "sha256": digest.hexdigest(),
    }


if __name__ == "__main__":
    run_stage(run)
