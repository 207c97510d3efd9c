"""Estimates with percentile intervals, some of which are open: beyond what was trained nothing is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_MIN_DEFINED = 0.9  # share of the draws in which an estimator must be defined


class Estimate(NamedTuple):
    """A value and its interval.

    A bound of infinity means that the interval is open on that side: more than `1 - confidence` / 2 of the draws are
    beyond the range that was trained.
    """

    value: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether the interval holds a value."""
        return self.low <= value <= self.high

    def exp(self) -> Estimate:
        """Returns the estimate of exp(value)."""
        return Estimate(*(float(np.exp(bound)) for bound in self))

    def to_json(self) -> dict[str, Any]:
        """Returns the numbers by name; None for those that are not finite."""
        return {name: value if np.isfinite(value) else None for name, value in self._asdict().items()}


def percentile_estimate(value: float, draws: NDArray[np.float64], confidence: float) -> Estimate | None:
    """Returns the percentile interval over the draws; None if the value or a tenth of the draws is undefined (NaN).

    Infinite draws count as beyond every number.
    """
    defined = np.sort(draws[~np.isnan(draws)])
    if np.isnan(value) or len(defined) < _MIN_DEFINED * max(len(draws), 1):
        return None
    tail = (1 - confidence) / 2 * (len(defined) - 1)
    low, high = defined[int(np.floor(tail))], defined[int(np.ceil(len(defined) - 1 - tail))]
    return Estimate(float(value), float(low), float(high))


def estimate_from(values: NDArray[np.float64], confidence: float) -> Estimate | None:
    """Returns the percentile interval over values of which the first is the point estimate and the others are draws."""
    return percentile_estimate(values[0], values[1:], confidence)


def format_estimate(estimate: Estimate | None, formatter: Callable[[float], str], missing: str = "–") -> str:
    """Formats an estimate with its interval, whose open sides are named."""
    if estimate is None:
        return missing
    low, high = np.isfinite(estimate.low), np.isfinite(estimate.high)
    value = formatter(estimate.value) if np.isfinite(estimate.value) else "not reached"
    if low and high:
        return f"{value} ({formatter(estimate.low)} to {formatter(estimate.high)})"
    if low:
        return f"{value} ({formatter(estimate.low)} or more)"
    return f"{value} ({formatter(estimate.high)} or less)" if high else f"{value} (no bound)"
