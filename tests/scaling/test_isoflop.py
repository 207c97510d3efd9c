"""Parabolas find their vertex, and flag one that is outside of the sizes tried."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.scaling.isoflop import fit_profiles
from pipeline.scaling.resampling import Cell
from pipeline.scaling.runs import Series

SIZES = (1e6, 2e6, 4e6, 8e6, 16e6)


def cells(log_losses, sizes=SIZES, budget=1e12):
    draws = np.ones(4)
    return [
        Cell(
            Series("x"),
            "compute",
            f"w{number}",
            budget,
            100,
            size,
            budget / 3 / size,
            budget,
            1.0,
            (float(np.exp(log_loss)),),
            np.exp(log_loss) * draws,
            0 * draws,
        )  # fmt: skip
        for number, (size, log_loss) in enumerate(zip(sizes, log_losses, strict=True))
    ]


def parabola(vertex: float):
    return 0.1 + 0.05 * (np.log(SIZES) - np.log(vertex)) ** 2


@pytest.mark.parametrize("vertex", [2.5e6, 4e6, 9e6])
def test_a_vertex_between_the_sizes_is_found(vertex):
    (profile,) = fit_profiles(cells(parabola(vertex)))
    assert profile.is_bracketed and profile.bracketed.all()
    assert np.exp(profile.log_f_opt) == pytest.approx(vertex) and profile.log_loss == pytest.approx(0.1)


@pytest.mark.parametrize(("vertex", "end"), [(5e5, 1e6), (4e7, 16e6)])
def test_a_vertex_outside_is_flagged_and_not_extrapolated(vertex, end):
    (profile,) = fit_profiles(cells(parabola(vertex)))
    assert not profile.is_bracketed
    assert np.exp(profile.log_f_opt[0]) == pytest.approx(end)
    assert profile.log_loss[0] == pytest.approx(min(parabola(vertex)))


def test_a_maximum_is_no_optimum():
    (profile,) = fit_profiles(cells(-parabola(4e6)))
    assert not profile.is_bracketed and round(np.exp(profile.log_f_opt[0])) in (1_000_000, 16_000_000)


@pytest.mark.parametrize("num_sizes", [1, 2])
def test_too_few_sizes_for_a_parabola_give_the_lowest(num_sizes):
    (profile,) = fit_profiles(cells([0.3, 0.2][:num_sizes], SIZES[:num_sizes]))
    assert not profile.is_bracketed and profile.log_loss[0] == pytest.approx([0.3, 0.2][num_sizes - 1])


def test_a_size_far_from_the_lowest_has_no_part():
    losses = parabola(2e6)
    losses[-1] += 3.0
    (profile,) = fit_profiles(cells(losses))
    assert np.exp(profile.log_f_opt[0]) == pytest.approx(2e6) and profile.fitted.tolist() == [True] * 4 + [False]


def test_draws_without_some_cells_use_the_others():
    study = cells(parabola(4e6))
    counts = {(cell.size, cell.budget): np.ones(4) for cell in study}
    for missing, draws in (("w0", [1]), ("w4", [1]), ("w1", [2]), ("w2", [2]), ("w3", [2]), ("w4", [2])):
        counts[missing, 1e12][draws] = 0
    for cell in study:
        counts[cell.size, 1e12][3] = 0
    (profile,) = fit_profiles(study, counts)
    assert profile.log_loss[:3] == pytest.approx(0.1) and profile.bracketed[:3].all()
    assert profile.log_loss[3] == pytest.approx(study[0].losses[0] and np.log(study[0].loss))
    assert np.isnan(profile.log_loss[4]) and not profile.bracketed[4]
