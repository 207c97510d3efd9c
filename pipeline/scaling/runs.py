"""Reads a study's folder: runs.csv, losses.parquet and study.json.

Everything that is fitted is fitted to *series*: the runs of an arm, or the same runs with predictions averaged over an
image and its flop (`<arm>, averaged`), which take twice the FLOPs at test time and no further training.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.base.errors import ConfigError
from pipeline.base.files import read_json

AVERAGED = "averaged"

STATES = ("finished", "diverged", "failed")

# A column of losses.parquet has the images' losses of a run in float32, whose mean is the run's val_loss.
_LOSS_TOLERANCE = 1e-3


class Series(NamedTuple):
    """An arm, or an arm with predictions averaged over the flop."""

    arm: str
    averaged: bool = False

    def __str__(self) -> str:
        return f"{self.arm}, {AVERAGED}" if self.averaged else self.arm

    @property
    def in_words(self) -> str:
        """The name in a sentence, where a comma separates."""
        return f"{self.arm} {AVERAGED}" if self.averaged else self.arm


@dataclass(frozen=True)
class Run:
    """A row of runs.csv. Losses are in nats, None where there is none."""

    trial: str
    study: str
    arm: str
    size: str
    seed: int
    budget: float
    """FLOPs asked for"""
    flops_image: float
    images_seen: float
    unique_images: int
    epochs: float
    compute: float
    """FLOPs spent"""
    val_loss: float | None
    val_loss_averaged: float | None
    state: str
    message: str = ""

    def loss_of(self, series: Series) -> float | None:
        """Returns the validation loss that a series has of this run."""
        if self.state != "finished" or self.arm != series.arm:
            return None
        return self.val_loss_averaged if series.averaged else self.val_loss


@dataclass(frozen=True)
class Study:
    """A study as its files have it."""

    runs: tuple[Run, ...]
    image_losses: Mapping[tuple[str, bool], NDArray[np.float32]]
    """(num_images,) of each finished run, by its trial and whether predictions are averaged"""
    baseline: str
    equivariant: str
    augmented: str | None
    bootstrap: int
    confidence: float
    seed: int
    flop_invariant: bool
    data: str
    not_trained: tuple[str, ...] = ()
    """Sizes that cannot spend a budget, and why."""

    @property
    def arms(self) -> list[str]:
        """The arms, in the order of the runs."""
        return list(dict.fromkeys(run.arm for run in self.runs))

    @property
    def series(self) -> list[Series]:
        """The series that have a loss, arms first."""
        found = [Series(arm, averaged) for averaged in (False, True) for arm in self.arms]
        return [series for series in found if any(run.loss_of(series) is not None for run in self.runs)]

    @property
    def num_images(self) -> int:
        """Number of validation images; 0 without finished runs."""
        return max((len(losses) for losses in self.image_losses.values()), default=0)

    def count(self, state: str, arm: str | None = None) -> int:
        """Returns the number of runs in a state, of one arm or of all."""
        return sum(run.state == state and arm in (None, run.arm) for run in self.runs)


def load_study(folder: Path) -> Study:
    """Loads a study.

    Raises: ConfigError: if a file is missing, or if losses.parquet is not of the runs in runs.csv.
    """
    for name in ("runs.csv", "study.json"):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder / name} is missing: {folder} is not a folder of the stage `scaling`")
    with (folder / "runs.csv").open(newline="") as file:
        runs = tuple(_parse_run(row, folder) for row in csv.DictReader(file))
    settings = read_json(folder / "study.json", {})
    return Study(
        runs=runs,
        image_losses=_load_losses(folder / "losses.parquet", runs),
        baseline=settings["baseline"],
        equivariant=settings["equivariant"],
        augmented=settings.get("augmented"),
        bootstrap=int(settings["bootstrap"]),
        confidence=float(settings["confidence"]),
        seed=int(settings["seed"]),
        flop_invariant=bool(settings["flop_invariant"]),
        data=settings["data"],
        not_trained=tuple(settings.get("left_out", ())),
    )


def _parse_run(row: Mapping[str, str], folder: Path) -> Run:
    def number(name: str) -> float | None:
        return float(row[name]) if row.get(name) else None

    try:
        run = Run(
            trial=row["trial"],
            study=row["study"],
            arm=row["arm"],
            size=row["size"],
            seed=int(row["seed"]),
            budget=float(row["budget"]),
            flops_image=float(row["flops_image"]),
            images_seen=float(row["images_seen"]),
            unique_images=int(row["unique_images"]),
            epochs=float(row["epochs"]),
            compute=float(row["compute"]),
            val_loss=number("val_loss"),
            val_loss_averaged=number("val_loss_averaged"),
            state=row["state"],
            message=row.get("message") or "",
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{folder / 'runs.csv'}: {row.get('trial', 'a row')} cannot be read: {error!r}") from None
    # A loss of 0 has no logarithm, and one that is not finite no place in a fit.
    if run.state == "finished" and not (run.val_loss and np.isfinite(run.val_loss) and run.val_loss > 0):
        raise ConfigError(f"{folder / 'runs.csv'}: {run.trial} has finished with a loss of {run.val_loss}")
    return run


def _load_losses(path: Path, runs: Iterable[Run]) -> dict[tuple[str, bool], NDArray[np.float32]]:
    expected: dict[tuple[str, bool], float] = {}
    for run in runs:
        for averaged in (False, True):
            loss = run.loss_of(Series(run.arm, averaged))
            if loss is not None:
                expected[run.trial, averaged] = loss
    if not expected:
        return {}
    if not path.is_file():
        raise ConfigError(f"{path} is missing: intervals need the loss of every validation image")
    table: Any = pq.read_table(path)
    found = {}
    for (trial, averaged), loss in expected.items():
        column = f"{trial}/{AVERAGED}" if averaged else trial
        if column not in table.column_names:
            raise ConfigError(f"{path} has no column {column!r}, which runs.csv has as finished")
        losses = table[column].to_numpy()
        if abs(float(losses.mean(dtype=np.float64)) - loss) > _LOSS_TOLERANCE * max(loss, 1.0):
            raise ConfigError(f"{path}: the mean of {column!r} is not the loss in runs.csv: files of two studies?")
        found[trial, averaged] = losses
    return found
