"""Measures forward throughput of X and E at the paper's S sizes, alternating: reports/paper_sizes.json.

The networks of a small study take microseconds per image, which says nothing about the speed of the paper's networks.
The rows are those of `flopeq throughput --table1 --rows S`, with the date.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from datetime import UTC, datetime
from pathlib import Path

from stages import load_experiment, run_stage

OUT = Path("reports/paper_sizes.json")


def run() -> None:
    """Writes an empty list if `throughput.paper_sizes` is off."""
    from pipeline import cluster

    experiment = load_experiment()
    settings, rows = experiment.train, []
    if experiment.throughput.paper_sizes:
        rows = cluster.call_on_gpu(_measure, settings.gpu is not False, settings=settings)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=2) + "\n")


def _measure(gpu: bool) -> list[dict]:
    import torch

    from flopeq.backends.malloc import keep_freed_memory
    from flopeq.measure.comparison import measure_table1, select_rows
    from flopeq.measure.throughput import protocol_for
    from pipeline.evaluation.throughput import log_new_models

    device = "cuda" if gpu and torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_freed_memory()
    selected, protocol = select_rows(["S"]), protocol_for(device)
    on_progress = log_new_models("paper sizes", len(selected), protocol.compile)
    rows = measure_table1(selected, protocol, device, None, on_progress)
    for row in rows:
        logging.info("%s: %s images/s on %s", row.paper_name, row.img_per_s, row.hardware)
    return [dataclasses.asdict(row) | {"date": datetime.now(UTC).date().isoformat()} for row in rows]


if __name__ == "__main__":
    run_stage(run)
