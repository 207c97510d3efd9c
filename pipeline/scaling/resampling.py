"""Cells of a study, and their losses in every draw of the bootstrap.

A *cell* has the runs of one series that differ in their seed only: one size, one budget, one number of unique images.
There are two bootstraps of two levels each, because the estimators differ in what they need:

- *Seeds and images*, for estimators that need every cell: losses, isoFLOP minima, multipliers, gaps. A draw resamples
  the validation images, once for all runs, so that networks are compared on the same images; and the seeds within each
  cell, independently for each arm. The deviation of a cell's draw from its mean is multiplied by a factor, for two
  reasons. n values drawn from n have (n - 1) / n of the variance, half of it for two seeds, which sqrt(n / (n - 1))
  corrects (Rao and Wu 1988). And seeds differ in their mean over the validation images partly because these are few.
  That part is in the level of images already, so it is taken out of the seeds' variance, as in an analysis of variance
  of seeds x images.
- *Cells and images*, for the exponents of a surface, which are defined for any selection of cells. A draw resamples
  size and budget together, the same for all arms. A cell comes with all of its seeds, as drawing these again would
  count their noise twice (Davison and Hinkley 1997, section 3.8). For the same reason the images move all cells of a
  series together, by their mean over the cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.scaling.runs import Run, Series, Study

Array = NDArray[np.float64]

_IMAGES_PER_CHUNK = 2**20  # elements of the largest array

# Losses as multiples of this add up without rounding, so that a sum does not depend on its order, nor on the threads.
_LOSS_STEP = 2.0**-24


@dataclass(frozen=True)
class Cell:
    """The runs of a series that differ in their seed only."""

    series: Series
    study: str
    """`compute` or `data`, as in runs.csv"""
    size: str
    budget: float
    unique_images: int
    flops_image: float
    images_seen: float
    compute: float
    epochs: float
    losses: tuple[float, ...]
    """Validation loss of each seed."""
    draws: Array
    """(draws,), the mean over resampled seeds and images"""
    image_shifts: Array
    """(draws,), by how much resampling only the images changes the logarithm of the loss"""

    @property
    def loss(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(self.losses))

    @property
    def num_seeds(self) -> int:
        return len(self.losses)


def make_cells(study: Study) -> list[Cell]:
    """Returns the cells of all series that have a finished run, with the draws of their losses."""
    rng = np.random.default_rng(study.seed)
    by_run = _resample_images(study, rng)
    cells = []
    for key in dict.fromkeys(_key(run) for run in study.runs):
        runs = [run for run in study.runs if _key(run) == key and run.state == "finished"]
        if not runs:
            continue
        weights = rng.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=study.bootstrap) / len(runs)
        cells += [
            _make_cell(Series(runs[0].arm, averaged), runs, study.image_losses, by_run, weights)
            for averaged in (False, True)
            if all((run.trial, averaged) in by_run for run in runs)
        ]
    return sorted(cells, key=lambda cell: cell.series.averaged)


def _key(run: Run) -> tuple[str, str, float, int]:
    return (run.arm, run.size, run.budget, run.unique_images)


def _make_cell(
    series: Series,
    runs: Sequence[Run],
    image_losses: Mapping[tuple[str, bool], NDArray[np.float32]],
    by_run: Mapping[tuple[str, bool], Array],
    weights: Array,
) -> Cell:
    first = runs[0]
    draws = np.stack([by_run[run.trial, series.averaged] for run in runs], axis=1)
    means, resampled = draws.mean(1), (draws * weights).sum(1)
    factor = _seed_factor([image_losses[run.trial, series.averaged] for run in runs])
    # A loss is positive, which the factor could change only where the seeds differ by more than their mean.
    scaled = np.maximum(means + factor * (resampled - means), 0.1 * resampled)
    losses = [run.loss_of(series) for run in runs]
    by_images = np.mean([image_losses[run.trial, series.averaged].mean(dtype=float) for run in runs])
    return Cell(
        series=series,
        study=first.study,
        size=first.size,
        budget=first.budget,
        unique_images=first.unique_images,
        flops_image=first.flops_image,
        images_seen=float(np.mean([run.images_seen for run in runs])),
        compute=float(np.mean([run.compute for run in runs])),
        epochs=float(np.mean([run.epochs for run in runs])),
        losses=tuple(loss for loss in losses if loss is not None),
        draws=scaled,
        image_shifts=np.log(means) - np.log(by_images),
    )


def _seed_factor(image_losses: Sequence[NDArray[np.float32]]) -> float:
    """Returns the factor of a cell's deviations: see the top of this file. `image_losses`: (num_images,) a seed."""
    losses = np.stack(image_losses).astype(float)
    n, num_images = losses.shape
    if n < 2:
        return 1.0
    variance = losses.mean(1).var(ddof=1)
    deviations = losses - losses.mean(0)
    deviations -= deviations.mean(1, keepdims=True)
    of_few_images = (deviations**2).sum() / (n - 1) / max(num_images - 1, 1) / num_images
    if variance <= 0:
        return 1.0
    return float(np.sqrt(n / (n - 1) * max(0.0, 1 - of_few_images / variance)))


def seeds_and_images(cells: Sequence[Cell]) -> Array:
    """Returns log losses, shape (1 + draws, cells): the point estimates, then resampled seeds and images."""
    return np.stack([np.concatenate([[np.log(cell.loss)], np.log(cell.draws)]) for cell in cells], axis=1)


def common_images(cells: Sequence[Cell]) -> Array:
    """Returns log losses, shape (1 + draws, cells): the point estimates, then all moved together by the images."""
    shifts = np.mean([cell.image_shifts for cell in cells], axis=0)
    return np.log([cell.loss for cell in cells]) + np.concatenate([[0.0], shifts])[:, None]


def draw_cells(cells: Sequence[Cell], num_draws: int, seed: int) -> dict[tuple[str, float], Array]:
    """Returns how often each draw has a size and budget, shape (draws,), the same for all arms."""
    grid = list(dict.fromkeys((cell.size, cell.budget) for cell in cells))
    if not grid:
        return {}
    rng = np.random.default_rng([seed, 1])
    counts = rng.multinomial(len(grid), np.full(len(grid), 1 / len(grid)), size=num_draws).astype(float)
    return dict(zip(grid, counts.T, strict=True))


def _resample_images(study: Study, rng: np.random.Generator) -> dict[tuple[str, bool], Array]:
    """Returns the mean loss over resampled images of each run, shape (draws,)."""
    keys, n = list(study.image_losses), study.num_images
    if not keys:
        return {}
    losses = np.stack([np.asarray(study.image_losses[key], float) for key in keys], axis=1)
    losses = np.round(losses / _LOSS_STEP)
    means = np.empty((study.bootstrap, len(keys)))
    per_chunk = max(1, _IMAGES_PER_CHUNK // n)
    for start in range(0, study.bootstrap, per_chunk):
        size = min(per_chunk, study.bootstrap - start)
        drawn = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(float)
        means[start : start + size] = weights @ losses
    return {key: means[:, number] * (_LOSS_STEP / n) for number, key in enumerate(keys)}
