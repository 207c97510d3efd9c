"""Fits of sums of power laws, such as L(F, D) = E0 + A F^-a + B D^-b and L(C) = E0 + K C^-g.

The logarithm of such a sum is a log-sum-exp of terms that are linear in the parameters (log A, a, log B, b, log E0).
The objective is the *sum* of Huber losses of the residuals of log L, as Hoffmann et al. 2022 chose. Besiroglu et al.
(arXiv 2404.10102) show what goes wrong with it: an averaged objective stops the optimizer early, and rounded
parameters do not reproduce the fit. So the objective is a sum here, and nothing is rounded.

A batch of problems is minimized at once by Levenberg's and Marquardt's method with analytic derivatives, Huber's
weights and box bounds. All starts of a fit are one batch, and so are all resamples of a bootstrap.

Legend: R problems, n points, T terms, p parameters. Losses are in nats, logarithms are natural.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MIN_DELTA = 1e-3
"""Least residual of log L at which the Huber loss becomes linear: that of Hoffmann et al."""

_HUBER_TUNING = 1.345 * 1.4826  # of the median absolute residual: 95 % efficient for normal noise (Huber 1981)

_MAX_EXPONENT = 2.0

_E0_RANGE = 1e3  # E0 is between the lowest loss divided by this, which is as good as 0, and the lowest loss

_MAX_ITERATIONS = 500


class Bounds(NamedTuple):
    """Box of the parameters, two vectors of shape (p,)."""

    low: Array
    high: Array


@dataclass(frozen=True)
class PowerLaws:
    """A model log L = logsumexp_t(terms[t] @ theta)."""

    terms: Array
    """(T, n, p)"""
    names: tuple[str, ...]
    """Of the p parameters."""
    bounds: Bounds
    starts: Array
    """(S, p)"""

    def at_bound(self, theta: Array) -> list[str]:
        """Returns the names of the parameters that are at a bound, and so not determined by the data."""
        low, high = self.bounds
        close = 1e-6 * (high - low)
        return [
            name
            for name, value, lowest, highest, margin in zip(self.names, theta, low, high, close, strict=True)
            if value <= lowest + margin or value >= highest - margin
        ]


class Fit(NamedTuple):
    """Minima of a batch of problems."""

    theta: Array
    """(R, p)"""
    objective: Array
    """(R,), sum of Huber losses"""


def surface_model(log_f: Array, log_d: Array, log_l: Array, arms: NDArray[np.int64]) -> PowerLaws:
    """Returns L = E0 + A F^-a + B D^-b over n points, whose `arms` (0, 1, ...) share a, b and E0.

    Parameters: a, b, log E0, then log A and log B of each arm. `log_f` and `log_d` must be centered: log A and log B
    are then the two terms' sizes at the center, and neither the starts nor the result depend on units.
    """
    n, num_arms = len(log_f), int(arms.max()) + 1
    terms = np.zeros((3, n, 3 + 2 * num_arms))
    points = np.arange(n)
    terms[0, points, 3 + 2 * arms] = 1
    terms[0, :, 0] = -log_f
    terms[1, points, 4 + 2 * arms] = 1
    terms[1, :, 1] = -log_d
    terms[2, :, 2] = 1
    coefficients = [name for arm in range(num_arms) for name in (f"A{arm}", f"B{arm}")]
    middle = float(np.median(log_l))
    starts = []
    for a, b, share, split in itertools.product(
        (0.1, 0.3, 0.6, 1.0), (0.1, 0.3, 0.6, 1.0), (0.02, 0.3, 0.6, 0.9), (0.15, 0.5, 0.85, 0.97)
    ):
        e0 = share * np.exp(log_l.min())
        rest = max(np.exp(middle) - e0, 0.05 * np.exp(middle))
        starts.append([a, b, np.log(e0), *[np.log(split * rest), np.log((1 - split) * rest)] * num_arms])
    return PowerLaws(terms, ("a", "b", "E0", *coefficients), _bounds(log_l, 2, 2 * num_arms), np.array(starts))


def frontier_model(log_c: Array, log_l: Array) -> PowerLaws:
    """Returns L = E0 + K C^-g over n points. Parameters: g, log E0, log K. `log_c` must be centered."""
    terms = np.zeros((2, len(log_c), 3))
    terms[0, :, 0] = -log_c
    terms[0, :, 2] = 1
    terms[1, :, 1] = 1
    middle = float(np.median(log_l))
    shares = np.linspace(0.01, 0.97, 25)
    e0 = shares * np.exp(log_l.min())
    rest = np.maximum(np.exp(middle) - e0, 0.02 * np.exp(middle))
    starts = [[g, np.log(e), np.log(k)] for g in np.linspace(0.05, 1.5, 10) for e, k in zip(e0, rest, strict=True)]
    return PowerLaws(terms, ("g", "E0", "K"), _bounds(log_l, 1, 1), np.array(starts))


def _bounds(log_l: Array, num_exponents: int, num_coefficients: int) -> Bounds:
    lowest, highest = float(log_l.min()), float(log_l.max())
    low = [0.0] * num_exponents + [lowest - np.log(_E0_RANGE)] + [lowest - 12] * num_coefficients
    high = [_MAX_EXPONENT] * num_exponents + [lowest] + [highest + 2] * num_coefficients
    return Bounds(np.array(low), np.array(high))


def fit_best(model: PowerLaws, log_l: Array) -> tuple[Array, float, float]:
    """Fits one set of points from all starts of the model.

    Returns the parameters, the objective, and the residual at which the Huber loss becomes linear: 1.345 standard
    deviations of the residuals of a first fit, by their median, and at least `MIN_DELTA`.
    """
    first, _ = best_fit(model, log_l, delta=1.0)
    residuals = predict(model.terms, first[None])[0] - log_l
    delta = max(MIN_DELTA, _HUBER_TUNING * float(np.median(np.abs(residuals))))
    theta, objective = best_fit(model, log_l, delta)
    return theta, objective, delta


def best_fit(model: PowerLaws, log_l: Array, delta: float) -> tuple[Array, float]:
    """Fits one set of points, shape (n,), from all starts of the model. Returns the parameters and the objective."""
    found = minimize(model, np.broadcast_to(log_l, (len(model.starts), len(log_l))), None, model.starts, delta)
    best = int(np.argmin(found.objective))
    return found.theta[best], float(found.objective[best])


def predict(terms: Array, theta: Array) -> Array:
    """Returns log L, shape (R, n), of `terms` (T, n, p) at `theta` (R, p)."""
    return _log_sum_exp(_exponents(terms, theta))[0]


def minimize(model: PowerLaws, log_l: Array, weights: Array | None, starts: Array, delta: float) -> Fit:
    """Minimizes the summed Huber loss of R problems, each from its own start.

    Args:
        log_l: (R, n).
        weights: (R, n), how often a problem has a point; None: once.
        starts: (R, p).
        delta: residual at which the Huber loss becomes linear.
    """
    low, high = model.bounds
    theta = np.clip(np.array(starts, float), low, high)
    weights = np.ones(log_l.shape) if weights is None else weights
    objective, damping = np.full(len(theta), np.inf), np.full(len(theta), 1e-2)
    active = np.arange(len(theta))
    state = _evaluate(model.terms, theta, log_l, weights, delta)
    objective = state.objective
    for _ in range(_MAX_ITERATIONS):
        if not len(active):
            break
        step = _damped_step(model, theta[active], state, damping[active])
        moved = np.clip(theta[active] + step, low, high)
        tried = _evaluate(model.terms, moved, log_l[active], weights[active], delta)
        better = tried.objective < objective[active]
        gain = objective[active] - tried.objective
        ended = better & (gain <= 1e-14 * objective[active] + 1e-300)
        ended |= np.abs(moved - theta[active]).max(1) < 1e-12
        theta[active[better]] = moved[better]
        objective[active[better]] = tried.objective[better]
        damping[active] = np.where(better, np.maximum(damping[active] / 4, 1e-15), damping[active] * 4)
        ended |= damping[active] > 1e12
        state = state.replaced(tried, better).take(~ended)
        active = active[~ended]
    return Fit(theta, objective)


class _State(NamedTuple):
    objective: Array
    gradient: Array
    curvature: Array
    """(R, p, p), Gauss's and Newton's approximation of the Hessian"""

    def replaced(self, other: _State, where: NDArray[np.bool_]) -> _State:
        return _State(
            np.where(where, other.objective, self.objective),
            np.where(where[:, None], other.gradient, self.gradient),
            np.where(where[:, None, None], other.curvature, self.curvature),
        )

    def take(self, kept: NDArray[np.bool_]) -> _State:
        return _State(self.objective[kept], self.gradient[kept], self.curvature[kept])


def _evaluate(terms: Array, theta: Array, log_l: Array, weights: Array, delta: float) -> _State:
    """Returns the objective and its derivatives: of a term's exponent, the softmax over the terms."""
    predicted, softmax = _log_sum_exp(_exponents(terms, theta))
    jacobian = np.einsum("rtn,tnp->rnp", softmax, terms)
    residual = predicted - log_l
    size = np.abs(residual)
    huber = np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))
    slope = weights * np.minimum(1.0, delta / np.maximum(size, 1e-300))
    weighted = jacobian * slope[:, :, None]
    gradient = np.einsum("rnp,rn->rp", weighted, residual)
    return _State((weights * huber).sum(1), gradient, np.matmul(weighted.transpose(0, 2, 1), jacobian))


def _damped_step(model: PowerLaws, theta: Array, state: _State, damping: Array) -> Array:
    """Returns the step of each problem; parameters at a bound that the gradient pushes against do not move."""
    low, high = model.bounds
    fixed = ((theta <= low) & (state.gradient > 0)) | ((theta >= high) & (state.gradient < 0))
    free = ~fixed
    curvature = state.curvature * (free[:, :, None] & free[:, None, :])
    diagonal = np.einsum("rpp->rp", curvature)
    scale = np.maximum(diagonal, 1e-12 * diagonal.max(1, keepdims=True) + 1e-30)
    diagonal += damping[:, None] * scale
    diagonal[fixed] = 1.0
    return np.asarray(np.linalg.solve(curvature, -(state.gradient * free)[:, :, None])[:, :, 0], float)


def _exponents(terms: Array, theta: Array) -> Array:
    num_terms, n, p = terms.shape
    return (theta @ terms.reshape(-1, p).T).reshape(len(theta), num_terms, n)


def _log_sum_exp(exponents: Array) -> tuple[Array, Array]:
    """Returns the log-sum-exp over axis 1, and the softmax."""
    largest = exponents.max(1, keepdims=True)
    shares = np.exp(exponents - largest)
    total = shares.sum(1, keepdims=True)
    return (largest + np.log(total))[:, 0], shares / total
