"""Cost ratios have known answers for power laws, and are open where nothing was trained."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.scaling.multipliers import average_cost_ratio, cost_ratio_at

LOG_C = np.log([1e9, 3e9, 1e10, 4e10])


def line(slope: float, factor: float) -> np.ndarray:
    """Log loss of a power law that needs `factor` times the compute of another with the same slope."""
    return (-slope * (LOG_C - np.log(factor)))[None]


@pytest.mark.parametrize("factor", [1.0, 1.7, 0.6])
def test_a_law_that_needs_more_compute_by_a_factor_has_that_multiplier(factor):
    ours, base = line(0.2, 1.0), line(0.2, factor)
    assert np.exp(average_cost_ratio(LOG_C, ours, LOG_C, base)) == pytest.approx([factor])
    assert np.exp(cost_ratio_at(LOG_C, ours, LOG_C, base))[0, 1:] == pytest.approx(3 * [factor])


def test_at_the_least_cost_only_the_side_of_one_is_known():
    assert cost_ratio_at(LOG_C, line(0.2, 1.0), LOG_C, line(0.2, 2.0))[0, 0] == np.inf
    assert cost_ratio_at(LOG_C, line(0.2, 2.0), LOG_C, line(0.2, 1.0))[0, 0] == -np.inf


def test_no_loss_in_common_is_open():
    assert average_cost_ratio(LOG_C, line(0.2, 1.0), LOG_C, line(0.2, 1e3)) == np.inf
    assert average_cost_ratio(LOG_C, line(0.2, 1e3), LOG_C, line(0.2, 1.0)) == -np.inf


def test_a_loss_that_rises_again_counts_at_its_lowest():
    falling = np.array([[1.0, 0.5, 0.5, 0.2]])
    rising = np.array([[1.0, 0.5, 0.9, 0.2]])
    base = np.array([[1.1, 0.6, 0.4, 0.3]])
    same = cost_ratio_at(LOG_C, falling, LOG_C, base)
    assert cost_ratio_at(LOG_C, rising, LOG_C, base) == pytest.approx(same)


def test_costs_without_a_loss_are_left_out():
    ours, base = line(0.2, 1.0), line(0.2, 1.5)
    ours[0, 1] = np.nan
    assert np.exp(average_cost_ratio(LOG_C, ours, LOG_C, base)) == pytest.approx([1.5])
    ours[0, 1:] = np.nan
    assert np.isnan(average_cost_ratio(LOG_C, ours, LOG_C, base)).all()
