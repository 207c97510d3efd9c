"""Everything that is fitted to a study's runs, in one object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.scaling import multipliers
from pipeline.scaling.gaps import Gap, gaps_over_budgets, gaps_over_images
from pipeline.scaling.intervals import Estimate, estimate_from
from pipeline.scaling.isoflop import Profile, fit_profiles
from pipeline.scaling.resampling import Cell, draw_cells, make_cells
from pipeline.scaling.runs import STATES, Series, Study
from pipeline.scaling.surfaces import (
    ExponentComparison,
    Law,
    compare_exponents,
    fit_frontier,
    fit_optimal_size,
    fit_slope,
    fit_surface,
)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Multiplier:
    """How many times the cost of a series the baseline needs for the same loss."""

    average: Estimate | None
    """Over all losses that both reach."""
    average_resampled: Estimate | None
    """The same, if sizes and budgets are resampled too; None for unique images."""
    costs: tuple[tuple[float, Estimate | None], ...]
    """Cost of the baseline, and the multiplier there. Not for the least cost, where only its side of 1 is known."""
    reason: str = ""
    """Why there is none."""


@dataclass(frozen=True)
class Analysis:
    """All that is known of a study."""

    study: Study
    compute_cells: Mapping[Series, list[Cell]]
    data_cells: Mapping[Series, list[Cell]]
    profiles: Mapping[Series, list[Profile]]
    surfaces: Mapping[Series, Law]
    frontiers: Mapping[Series, Law]
    slopes: Mapping[Series, Law]
    optimal_sizes: Mapping[Series, Law]
    exponents: ExponentComparison
    slope_difference: Estimate | None
    """Of the equivariant arm minus the baseline."""
    optimal_size_difference: Estimate | None
    compute_multipliers: Mapping[Series, Multiplier]
    data_multipliers: Mapping[Series, Multiplier]
    budget_gaps: list[Gap]
    data_gaps: list[Gap]

    @property
    def baseline(self) -> Series:
        return Series(self.study.baseline)

    @property
    def equivariant(self) -> Series:
        return Series(self.study.equivariant)


def analyze(study: Study) -> Analysis:
    """Fits everything that the runs allow."""
    cells, confidence = make_cells(study), study.confidence
    compute_cells = _by_series(cell for cell in cells if cell.study == "compute")
    data_cells = _by_series(_data_study(cells))
    counts = draw_cells([cell for cell in cells if cell.study == "compute"], study.bootstrap, study.seed)
    profiles = {series: fit_profiles(found) for series, found in compute_cells.items()}
    resampled = {series: fit_profiles(found, counts) for series, found in compute_cells.items()}
    surfaces = {
        series: fit_surface(found, counts, confidence) for series, found in compute_cells.items() if not series.averaged
    }
    slopes = {series: fit_slope(found, confidence) for series, found in profiles.items()}
    sizes = {series: fit_optimal_size(found, confidence) for series, found in profiles.items()}
    base, ours = Series(study.baseline), Series(study.equivariant)
    return Analysis(
        study=study,
        compute_cells=compute_cells,
        data_cells=data_cells,
        profiles=profiles,
        surfaces=surfaces,
        frontiers={series: fit_frontier(found, confidence) for series, found in profiles.items()},
        slopes=slopes,
        optimal_sizes=sizes,
        exponents=_compare_exponents(compute_cells, surfaces, base, ours, confidence),
        slope_difference=_difference(slopes, "slope", base, ours, confidence),
        optimal_size_difference=_difference(sizes, "size", base, ours, confidence),
        compute_multipliers={
            series: compute_multiplier(profiles, resampled, series, base, confidence)
            for series in profiles
            if series != base
        },
        data_multipliers={
            series: _data_multiplier(data_cells, series, base, confidence) for series in data_cells if series != base
        },
        budget_gaps=gaps_over_budgets(profiles, compute_cells, base, ours, confidence),
        data_gaps=gaps_over_images(data_cells, base, ours, confidence),
    )


def count_runs(study: Study) -> dict[str, dict[str, int]]:
    """Returns the number of runs of each arm by state."""
    return {arm: {state: study.count(state, arm) for state in STATES} for arm in study.arms}


def _by_series(cells: Any) -> dict[Series, list[Cell]]:
    found: dict[Series, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.series, []).append(cell)
    return found


def _data_study(cells: Sequence[Cell]) -> list[Cell]:
    """Returns the cells of the data study: those with fewer images, and those with all images beside them."""
    places = {(cell.size, cell.budget) for cell in cells if cell.study == "data"}
    return [cell for cell in cells if (cell.size, cell.budget) in places]


def _compare_exponents(
    cells: Mapping[Series, list[Cell]], laws: Mapping[Series, Law], base: Series, ours: Series, confidence: float
) -> ExponentComparison:
    for series in (base, ours):
        if series not in laws:
            return ExponentComparison(reason=f"{series} has no finished run")
        if not laws[series].is_identified:
            return ExponentComparison(reason=f"the surface of {series} is not identified")
    return compare_exponents(cells[ours], cells[base], laws[ours], laws[base], confidence)


def _difference(
    laws: Mapping[Series, Law], name: str, base: Series, ours: Series, confidence: float
) -> Estimate | None:
    if not all(series in laws and laws[series].is_identified for series in (base, ours)):
        return None
    draws = laws[ours].draws[name] - laws[base].draws[name]
    return estimate_from(draws, confidence)


def compute_multiplier(
    profiles: Mapping[Series, list[Profile]],
    resampled: Mapping[Series, list[Profile]],
    series: Series,
    base: Series,
    confidence: float,
) -> Multiplier:
    """Returns the compute multiplier of a series. `resampled`: profiles whose draws have other cells."""
    paired = _paired(profiles, series, base)
    if len(paired) < 2:
        return Multiplier(None, None, (), f"{len(paired)} budget{'s' * (len(paired) != 1)} in common with {base}")
    curves = _curves(paired)
    at_costs = multipliers.cost_ratio_at(*curves)
    costs = tuple(
        (theirs.budget, _ratio(at_costs[:, number], curves[0][number] - curves[0][0], confidence))
        for number, (_, theirs) in enumerate(paired)
        if number
    )
    average = multipliers.average_cost_ratio(*curves)
    over_cells = multipliers.average_cost_ratio(*_curves(_paired(resampled, series, base)))
    spread = curves[0][-1] - curves[0][0]
    return Multiplier(
        _ratio(average, spread, confidence),
        _ratio(np.concatenate([average[:1], over_cells[1:]]), spread, confidence),
        costs,
    )


def _data_multiplier(cells: Mapping[Series, list[Cell]], series: Series, base: Series, confidence: float) -> Multiplier:
    ours, theirs = ({cell.unique_images: cell for cell in cells.get(each, [])} for each in (series, base))
    common = sorted(ours.keys() & theirs.keys())
    if len(common) < 2:
        return Multiplier(
            None, None, (), f"{len(common)} number{'s' * (len(common) != 1)} of unique images in common with {base}"
        )
    log_n = np.log(common)
    losses, base_losses = (
        np.stack([np.concatenate([[np.log(found[n].loss)], np.log(found[n].draws)]) for n in common], axis=1)
        for found in (ours, theirs)
    )
    at_costs = multipliers.cost_ratio_at(log_n, losses, log_n, base_losses)
    average = multipliers.average_cost_ratio(log_n, losses, log_n, base_losses)
    costs = tuple(
        (float(n), _ratio(at_costs[:, k], log_n[k] - log_n[0], confidence)) for k, n in enumerate(common) if k
    )
    return Multiplier(_ratio(average, log_n[-1] - log_n[0], confidence), None, costs)


def _paired(profiles: Mapping[Series, list[Profile]], series: Series, base: Series) -> list[tuple[Profile, Profile]]:
    theirs = {profile.budget: profile for profile in profiles.get(base, [])}
    return [(profile, theirs[profile.budget]) for profile in profiles[series] if profile.budget in theirs]


def _curves(paired: Sequence[tuple[Profile, Profile]]) -> tuple[Any, Any, Any, Any]:
    """Returns log compute and log loss of a series, then those of its baseline."""
    sides = zip(*paired, strict=True)
    found = [
        part
        for side in sides
        for part in (np.array([p.log_c for p in side]), np.stack([p.log_loss for p in side], axis=1))
    ]
    return found[0], found[1], found[2], found[3]


def _ratio(draws: Array, spread: float, confidence: float) -> Estimate | None:
    """Returns a ratio from the draws of its logarithm, the point estimate first.

    An infinite draw is a ratio that is not reached: it is greater than that of the costs that were tried, whose
    logarithm is `spread`. One of minus infinity is less than its inverse.
    """
    estimate = estimate_from(draws, confidence)
    if estimate is None:
        return None
    low = spread if estimate.low == np.inf else estimate.low
    high = -spread if estimate.high == -np.inf else estimate.high
    found = Estimate(estimate.value, low, high).exp()
    return Estimate(*(bound if bound > 0 else -np.inf for bound in found))
