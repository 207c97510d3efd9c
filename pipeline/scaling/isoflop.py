"""IsoFLOP profiles: at each budget a parabola of log loss over log FLOPs of an image, and its minimum.

This is approach 2 of Hoffmann et al. 2022, with FLOPs of an image in place of parameters. A vertex outside of the
sizes tried is not an estimate and is flagged. The loss of a budget is then the parabola's minimum *over the sizes
tried*. With two sizes the parabola is a line, with one a constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.scaling.resampling import Cell, common_images, seeds_and_images

Array = NDArray[np.float64]


WINDOW = 2
"""Number of sizes on each side of the lowest loss that the parabola is fitted to. Farther away it fits badly."""


@dataclass(frozen=True)
class Profile:
    """A series at one budget. Arrays have the point estimate first, then a value for each draw: shape (1 + draws,)."""

    budget: float
    log_f: Array
    """(sizes,), ascending"""
    log_c: float
    """Logarithm of the compute, the mean over the sizes."""
    log_loss: Array
    """Minimum over the sizes tried."""
    log_f_opt: Array
    """Where it is: the vertex, or the end of the range that is nearer to it."""
    bracketed: NDArray[np.bool_]
    """Whether the vertex is a minimum between the sizes tried."""
    fitted: NDArray[np.bool_]
    """(sizes,), those near the lowest loss, which the parabola is fitted to"""
    coefficients: Array
    """(3,), of the point estimate: log L = c0 + c1 x + c2 x^2 with x = log F - mean(log F)"""

    @property
    def is_bracketed(self) -> bool:
        return bool(self.bracketed[0])


def fit_profiles(cells: Sequence[Cell], counts: Mapping[tuple[str, float], Array] | None = None) -> list[Profile]:
    """Fits each budget of the cells of one series, in ascending order.

    Args:
        counts: how often each draw has a size and budget, shape (draws,); None: once. A draw in which a budget has no
            cell has NaN there.
    """
    all_log_losses = seeds_and_images(cells) if counts is None else common_images(cells)
    profiles = []
    for budget in sorted({cell.budget for cell in cells}):
        order = [number for number, cell in enumerate(cells) if cell.budget == budget]
        order.sort(key=lambda number: cells[number].flops_image)
        row = [cells[number] for number in order]
        log_f = np.log([cell.flops_image for cell in row])
        log_loss = all_log_losses[:, order]
        weights = np.ones_like(log_loss)
        if counts is not None:
            weights[1:] = np.stack([counts[cell.size, budget] for cell in row], axis=1)
        lowest = int(np.argmin(log_loss[0]))
        weights[:, : max(0, lowest - WINDOW)] = weights[:, lowest + WINDOW + 1 :] = 0
        center = log_f.mean()
        coefficients = _fit_parabolas(log_f - center, log_loss, weights)
        x, value, bracketed = _minimum(coefficients, log_f - center, weights)
        log_c = float(np.mean(np.log([cell.compute for cell in row])))
        profiles.append(Profile(budget, log_f, log_c, value, x + center, bracketed, weights[0] > 0, coefficients[0]))
    return profiles


def _fit_parabolas(x: Array, y: Array, weights: Array) -> Array:
    """Returns the weighted least-squares polynomials of degree 2, or less where fewer x have a weight: (R, 3)."""
    coefficients = np.full((len(y), 3), np.nan)
    num_points = (weights > 0).sum(1)
    for degree in range(3):
        rows = num_points == degree + 1 if degree < 2 else num_points >= 3
        if not rows.any():
            continue
        powers = x[:, None] ** np.arange(degree + 1)
        normal = np.einsum("rn,np,nq->rpq", weights[rows], powers, powers)
        moments = np.einsum("rn,np->rp", weights[rows] * y[rows], powers)
        coefficients[rows] = 0.0
        coefficients[rows, : degree + 1] = np.linalg.solve(normal, moments[:, :, None])[:, :, 0]
    return coefficients


def _minimum(coefficients: Array, x: Array, weights: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Returns where each parabola is lowest between the least and the greatest x with a weight, and how low."""
    present = weights > 0
    low = np.where(present, x, np.inf).min(1)
    high = np.where(present, x, -np.inf).max(1)
    low, high = np.where(present.any(1), low, np.nan), np.where(present.any(1), high, np.nan)
    c2 = coefficients[:, 2]
    convex = c2 > 1e-12
    vertex = np.where(convex, -coefficients[:, 1] / np.where(convex, 2 * c2, 1.0), np.nan)
    bracketed = convex & (vertex >= low) & (vertex <= high)
    at_low, at_high = _value(coefficients, low), _value(coefficients, high)
    ends = np.where(at_low <= at_high, low, high)
    lowest = np.where(bracketed, vertex, ends)
    return lowest, _value(coefficients, lowest), bracketed


def _value(coefficients: Array, x: Array) -> Array:
    return coefficients[:, 0] + x * (coefficients[:, 1] + x * coefficients[:, 2])
