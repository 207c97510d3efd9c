"""`runs.csv` and `losses.parquet`: what each training of the study reached."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.base.files import atomic_path
from pipeline.scaling.grid import Training
from pipeline.sweeps.trial import LOSSES_FILE, TrialOutcome

Row = dict[str, Any]
"""A training by the columns of runs.csv; None where nothing was measured."""

RUNS_FILE, LOSSES_TABLE = "runs.csv", "losses.parquet"

COLUMNS = (
    "trial", "study", "arm", "size", "seed", "budget", "params", "flops_image", "images_seen", "unique_images",
    "epochs", "compute", "val_loss", "top1_pct", "val_loss_averaged", "top1_averaged_pct", "seconds", "state",
    "message",
)  # fmt: skip


def make_row(training: Training, outcome: TrialOutcome, trials_dir: Path) -> Row:
    """Returns the row of a training that has ended."""
    losses = read_losses(outcome, trials_dir)
    return {
        "trial": training.name,
        **{name: getattr(training, name) for name in COLUMNS[1:12]},
        "val_loss": _mean(losses, "losses"),
        "top1_pct": _mean(losses, "hits", 100),
        "val_loss_averaged": _mean(losses, "averaged_losses"),
        "top1_averaged_pct": _mean(losses, "averaged_hits", 100),
        "seconds": outcome.seconds,
        "state": outcome.state,
        "message": outcome.message,
    }


def read_losses(outcome: TrialOutcome, trials_dir: Path) -> dict[str, NDArray]:
    """Returns what pipeline/training/image_losses.py measured after a training; {} unless it has finished."""
    if outcome.state != "finished":
        return {}
    with np.load(trials_dir / outcome.spec.fingerprint / LOSSES_FILE) as arrays:
        return dict(arrays)


def write_runs(folder: Path, rows: Sequence[Row]) -> None:
    """Writes runs.csv. Numbers have as many digits as it takes to read them back unchanged."""
    with atomic_path(folder / RUNS_FILE) as partial, partial.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows([row[column] for column in COLUMNS] for row in rows)


def write_losses(folder: Path, losses: Mapping[str, Mapping[str, NDArray]]) -> None:
    """Writes losses.parquet: a float32 column for each training, and one named `<training>/averaged` where the
    prediction averaged over the flop was measured; a row per validation image, in the order of the index."""
    columns = {}
    for name, arrays in losses.items():
        for suffix, key in (("", "losses"), ("/averaged", "averaged_losses")):
            if key in arrays:
                columns[name + suffix] = pa.array(arrays[key].astype(np.float32))
    with atomic_path(folder / LOSSES_TABLE) as partial:
        pq.write_table(pa.table(columns), partial)


def _mean(arrays: Mapping[str, NDArray], key: str, factor: float = 1) -> float | None:
    return factor * float(arrays[key].mean()) if key in arrays else None
