"""How much more of a cost (compute, or unique images) one series needs than another for the same loss.

The curves are the losses at each cost, joined by straight lines in log-log scale, where power laws are straight. They
are read only where they were measured: nothing is extrapolated. A curve that rises is replaced by its running minimum,
the loss that can be had for *at most* that cost.

Two estimators, both of log(cost of the baseline / cost of the other):

- *at a budget*: for the loss that the worse of the two reaches there. Below the least cost that was tried it is open
  (infinite).
- *average*: the mean over all losses that both reach, evenly in log loss. In video coding this is the Bjøntegaard
  delta rate (Bjøntegaard 2001, ITU-T VCEG-M33), there of the rate at equal quality.

Legend: R draws, K costs. Logarithms are natural.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_NUM_LEVELS = 65


def cost_ratio_at(log_cost: Array, log_loss: Array, base_log_cost: Array, base_log_loss: Array) -> Array:
    """Returns the log ratio at each of the K costs, shape (R, K).

    Args:
        log_cost, base_log_cost: (K,), ascending; the k-th of both belong together.
        log_loss, base_log_loss: (R, K).
    """
    loss, base = np.minimum.accumulate(log_loss, 1), np.minimum.accumulate(base_log_loss, 1)
    levels = np.maximum(loss, base)
    ratios = np.empty_like(levels)
    for number, level in enumerate(levels):
        ours, theirs = _cost_of(level, log_cost, loss[number]), _cost_of(level, base_log_cost, base[number])
        ratios[number] = theirs - ours  # at most one of them is infinite: the worse of the two reaches the level
    return ratios


def average_cost_ratio(log_cost: Array, log_loss: Array, base_log_cost: Array, base_log_loss: Array) -> Array:
    """Returns the mean log ratio over the losses that both reach, shape (R,).

    It is infinite if they reach no loss in common, and NaN if less than two costs are known. Costs whose loss is NaN
    are left out.
    """
    ratios = np.full(len(log_loss), np.nan)
    for number, (losses, base_losses) in enumerate(zip(log_loss, base_log_loss, strict=True)):
        known = ~(np.isnan(losses) | np.isnan(base_losses))
        if known.sum() < 2:
            continue
        ours, theirs = np.minimum.accumulate(losses[known]), np.minimum.accumulate(base_losses[known])
        low, high = max(ours[-1], theirs[-1]), min(ours[0], theirs[0])
        if low > high:
            ratios[number] = np.inf if theirs[-1] > ours[0] else -np.inf
            continue
        levels = np.linspace(low, high, _NUM_LEVELS)
        difference = _cost_of(levels, base_log_cost[known], theirs) - _cost_of(levels, log_cost[known], ours)
        ratios[number] = difference.mean()
    return ratios


def _cost_of(levels: Array, log_cost: Array, falling: Array) -> Array:
    """Returns the least cost at which a falling curve reaches each level: -inf above its first point.

    Levels are at or above the curve's last point.
    """
    kept = np.concatenate([[True], falling[1:] < falling[:-1]])
    found = np.interp(-levels, -falling[kept], log_cost[kept])
    return np.where(levels > falling[0], -np.inf, found)
