"""Laws that are fitted to the cells of a study: surface, frontier, slope; and when they are not identified.

A law is not printed if there are fewer than three sizes or budgets, if the interval of an exponent is wider than 0.5,
or if a parameter is at its bound, which means that the data do not determine it. `Law.reason` then says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.scaling import powerlaw
from pipeline.scaling.intervals import Estimate, estimate_from
from pipeline.scaling.isoflop import Profile
from pipeline.scaling.resampling import Cell, common_images

Array = NDArray[np.float64]

MIN_SIZES = MIN_BUDGETS = 3

MAX_WIDTH = 0.5
"""Of the interval of an exponent."""


@dataclass(frozen=True)
class Law:
    """Parameters of a fitted law, or the reason why they are not printed."""

    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    reason: str = ""
    draws: Mapping[str, Array] = field(default_factory=dict)
    """Of the exponents, (1 + draws,), the point estimate first."""

    @property
    def is_identified(self) -> bool:
        return not self.reason


def fit_surface(cells: Sequence[Cell], counts: Mapping[tuple[str, float], Array], confidence: float) -> Law:
    """Fits L = E0 + A F^-a + B D^-b to the cells of one series.

    Estimates: a, b, A, B, E0; `frontier`, the exponent ab / (a + b) of L over compute; and `size`, the exponent
    b / (a + b) of the optimal size over compute.
    """
    if reason := _too_few(cells):
        return Law(reason=reason)
    points = _Points.of(cells, [cells[0].series.arm])
    theta, _, delta = powerlaw.fit_best(points.model, points.log_l[0])
    if at_bound := points.model.at_bound(theta):
        return Law(reason=f"{_join(points.plain_names(at_bound))} at the end of what is searched")
    starts = np.tile(theta, (len(points.log_l) - 1, 1))
    fit = powerlaw.minimize(points.model, points.log_l[1:], points.weights(counts), starts, delta)
    a, b, log_e0, log_a, log_b = np.concatenate([theta[None], fit.theta]).T
    draws = {
        "a": a,
        "b": b,
        "A": np.exp(log_a + a * points.center_f),
        "B": np.exp(log_b + b * points.center_d),
        "E0": np.exp(log_e0),
        "frontier": a * b / np.maximum(a + b, 1e-12),
        "size": b / np.maximum(a + b, 1e-12),
    }
    return _guarded(draws, ("a", "b"), confidence)


@dataclass(frozen=True)
class ExponentComparison:
    """Whether two series have the same exponents a, b and the same E0."""

    differences: Mapping[str, Estimate] = field(default_factory=dict)
    """Exponents of the series minus those of the baseline: a, b, frontier, size"""
    aicc_shared: float | None = None
    aicc_separate: float | None = None
    reason: str = ""

    @property
    def told_apart(self) -> list[str]:
        """The exponents whose difference has an interval without 0."""
        return [name for name, difference in self.differences.items() if not difference.holds(0.0)]

    @property
    def are_separate(self) -> bool:
        """Whether both say so: an interval of a or b without 0, and AICc."""
        if self.aicc_shared is None or self.aicc_separate is None or not {"a", "b"} & {*self.told_apart}:
            return False
        return self.aicc_separate < self.aicc_shared


def compare_exponents(
    cells: Sequence[Cell], base_cells: Sequence[Cell], law: Law, base_law: Law, confidence: float
) -> ExponentComparison:
    """Compares two series whose surfaces are identified: by the bootstrap of the differences, and by AICc.

    The corrected criterion of Akaike is n log(2 S / n) + 2 k + 2 k (k + 1) / (n - k - 1) with the summed Huber losses
    S in place of half of the sum of squares; k counts the parameters and the scale of the residuals.
    """
    differences = {}
    for name in ("a", "b", "frontier", "size"):
        draws = law.draws[name] - base_law.draws[name]
        if estimate := estimate_from(draws, confidence):
            differences[name] = estimate
    both = _Points.of([*base_cells, *cells], [base_cells[0].series.arm, cells[0].series.arm])
    halves = [_Points.of(half, [half[0].series.arm]) for half in (base_cells, cells)]
    delta = max(powerlaw.fit_best(half.model, half.log_l[0])[2] for half in halves)
    separate = sum(powerlaw.best_fit(half.model, half.log_l[0], delta)[1] for half in halves)
    shared = powerlaw.best_fit(both.model, both.log_l[0], delta)[1]
    n = both.log_l.shape[1]
    return ExponentComparison(differences, _aicc(shared, n, 8), _aicc(separate, n, 11))


def fit_frontier(profiles: Sequence[Profile], confidence: float) -> Law:
    """Fits L = E0 + K C^-g to the lowest loss at each budget. Estimates: g, E0, K."""
    if len(profiles) < MIN_BUDGETS:
        return Law(reason=_count_reason(len(profiles), "budget"))
    log_c = np.array([profile.log_c for profile in profiles])
    log_l = np.stack([profile.log_loss for profile in profiles], axis=1)
    center = log_c.mean()
    model = powerlaw.frontier_model(log_c - center, log_l[0])
    theta, _, delta = powerlaw.fit_best(model, log_l[0])
    if at_bound := model.at_bound(theta):
        return Law(reason=f"{_join(at_bound)} at the end of what is searched")
    fit = powerlaw.minimize(model, log_l[1:], None, np.tile(theta, (len(log_l) - 1, 1)), delta)
    g, log_e0, log_k = np.concatenate([theta[None], fit.theta]).T
    return _guarded({"g": g, "E0": np.exp(log_e0), "K": np.exp(log_k + g * center)}, ("g",), confidence)


def fit_slope(profiles: Sequence[Profile], confidence: float) -> Law:
    """Fits log L = constant - slope * log C by least squares, for which two budgets are enough. Estimate: slope."""
    if len(profiles) < 2:
        return Law(reason=_count_reason(len(profiles), "budget"))
    log_l = np.stack([profile.log_loss for profile in profiles], axis=1)
    return _guarded({"slope": -_slopes([p.log_c for p in profiles], log_l)}, (), confidence)


def fit_optimal_size(profiles: Sequence[Profile], confidence: float) -> Law:
    """Fits log F_opt = constant + size * log C to the budgets whose optimum lies between the sizes tried."""
    inside = [profile for profile in profiles if profile.is_bracketed]
    if len(inside) < MIN_BUDGETS:
        return Law(reason=f"the optimum lies between the sizes tried at {len(inside)} of {len(profiles)} budgets only")
    log_f = np.stack([profile.log_f_opt for profile in inside], axis=1)
    return _guarded({"size": _slopes([p.log_c for p in inside], log_f)}, ("size",), confidence)


def _slopes(x: Sequence[float], y: Array) -> Array:
    deviations = np.array(x) - np.mean(x)
    return y @ deviations / (deviations @ deviations)


def _guarded(draws: Mapping[str, Array], exponents: Sequence[str], confidence: float) -> Law:
    estimates = {}
    for name, values in draws.items():
        if estimate := estimate_from(values, confidence):
            estimates[name] = estimate
    for name in exponents:
        if name not in estimates:
            return Law(reason=f"{name} is not defined in the resamples")
        if (width := estimates[name].high - estimates[name].low) > MAX_WIDTH:
            return Law(reason=f"the interval of {name} is {width:.1f} wide, more than {MAX_WIDTH}")
    return Law(estimates, draws=draws)


def _too_few(cells: Sequence[Cell]) -> str:
    if (sizes := len({cell.size for cell in cells})) < MIN_SIZES:
        return _count_reason(sizes, "size")
    budgets = len({cell.budget for cell in cells})
    if budgets < MIN_BUDGETS:
        return _count_reason(budgets, "budget")
    return ""


def _count_reason(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)} with a finished run, fewer than {MIN_BUDGETS}"


def _join(names: Sequence[str]) -> str:
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}"


def _aicc(objective: float, n: int, k: int) -> float | None:
    if n - k - 1 <= 0 or objective <= 0:
        return None
    return float(n * np.log(2 * objective / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1))


@dataclass(frozen=True)
class _Points:
    """Cells as the points of a surface, centered."""

    cells: Sequence[Cell]
    model: powerlaw.PowerLaws
    log_l: Array
    """(1 + draws, n), the point estimate first"""
    center_f: float
    center_d: float

    @classmethod
    def of(cls, cells: Sequence[Cell], arms: Sequence[str]) -> _Points:
        log_f, log_d = np.log([c.flops_image for c in cells]), np.log([c.images_seen for c in cells])
        log_l = common_images(cells)
        center_f, center_d = float(log_f.mean()), float(log_d.mean())
        numbers = np.array([arms.index(cell.series.arm) for cell in cells])
        model = powerlaw.surface_model(log_f - center_f, log_d - center_d, log_l[0], numbers)
        return cls(cells, model, log_l, center_f, center_d)

    def weights(self, counts: Mapping[tuple[str, float], Array]) -> Array:
        return np.stack([counts[cell.size, cell.budget] for cell in self.cells], axis=1)

    @staticmethod
    def plain_names(names: Sequence[str]) -> list[str]:
        return [name.rstrip("0") if name in ("A0", "B0") else name for name in names]
