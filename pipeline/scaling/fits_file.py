"""fits.json: all numbers of a fitted study, unrounded. The figures are drawn from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.scaling.fits import Analysis, Multiplier, count_runs
from pipeline.scaling.gaps import Gap
from pipeline.scaling.intervals import Estimate, estimate_from, percentile_estimate
from pipeline.scaling.isoflop import Profile
from pipeline.scaling.resampling import Cell
from pipeline.scaling.runs import Series
from pipeline.scaling.surfaces import Law


def to_json(analysis: Analysis) -> dict[str, Any]:
    """Returns the content of fits.json. Bounds that are None are open: beyond what was trained."""
    study, confidence = analysis.study, analysis.study.confidence
    return {
        "study": {
            "data": study.data,
            "flop_invariant": study.flop_invariant,
            "baseline": study.baseline,
            "equivariant": study.equivariant,
            "augmented": study.augmented,
            "bootstrap": study.bootstrap,
            "confidence": confidence,
            "seed": study.seed,
            "validation_images": study.num_images,
            "runs": count_runs(study),
        },
        "cells": [_cell(cell, confidence) for cells in analysis.compute_cells.values() for cell in cells],
        "data_cells": [_cell(cell, confidence) for cells in analysis.data_cells.values() for cell in cells],
        "profiles": [
            {**_names(series), **_profile(profile, confidence)}
            for series, profiles in analysis.profiles.items()
            for profile in profiles
        ],
        "surfaces": _laws(analysis.surfaces),
        "frontiers": _laws(analysis.frontiers),
        "slopes": _laws(analysis.slopes),
        "optimal_sizes": _laws(analysis.optimal_sizes),
        "exponents": {
            "differences": {name: each.to_json() for name, each in analysis.exponents.differences.items()},
            "aicc_shared": analysis.exponents.aicc_shared,
            "aicc_separate": analysis.exponents.aicc_separate,
            "reason": analysis.exponents.reason,
        },
        "slope_difference": _estimate(analysis.slope_difference),
        "optimal_size_difference": _estimate(analysis.optimal_size_difference),
        "compute_multipliers": _multipliers(analysis.compute_multipliers),
        "data_multipliers": _multipliers(analysis.data_multipliers),
        "budget_gaps": [_gap(gap) for gap in analysis.budget_gaps],
        "data_gaps": [_gap(gap) for gap in analysis.data_gaps],
    }


def _names(series: Series) -> dict[str, Any]:
    return {"series": str(series), "arm": series.arm, "averaged": series.averaged}


def _cell(cell: Cell, confidence: float) -> dict[str, Any]:
    interval = percentile_estimate(cell.loss, cell.draws, confidence) if cell.num_seeds > 1 else None
    return {
        **_names(cell.series),
        "size": cell.size,
        "budget": cell.budget,
        "unique_images": cell.unique_images,
        "flops_image": cell.flops_image,
        "test_flops_image": cell.flops_image * (2 if cell.series.averaged else 1),
        "images_seen": cell.images_seen,
        "compute": cell.compute,
        "epochs": cell.epochs,
        "seeds": cell.num_seeds,
        "loss": cell.loss,
        "low": interval and interval.low,
        "high": interval and interval.high,
    }


def _profile(profile: Profile, confidence: float) -> dict[str, Any]:
    """The optimal size is None where it is not bracketed; a bound of it is None at the end of the sizes tried."""
    loss = estimate_from(profile.log_loss, confidence)
    optimum = None
    if profile.is_bracketed:
        ends = profile.log_f[[0, -1]]
        draws = np.where(profile.log_f_opt <= ends[0], -np.inf, profile.log_f_opt)
        draws = np.where(profile.log_f_opt >= ends[1], np.inf, draws)
        optimum = percentile_estimate(profile.log_f_opt[0], draws[1:], confidence)
        optimum = optimum and Estimate(*(bound if bound > 0 else -np.inf for bound in optimum.exp()))
    return {
        "budget": profile.budget,
        "compute": float(np.exp(profile.log_c)),
        "loss": _estimate(loss and loss.exp()),
        "bracketed": profile.is_bracketed,
        "bracketed_draws": float(profile.bracketed[1:].mean()),
        "lowest_at": float(np.exp(profile.log_f_opt[0])),
        "flops_image": _estimate(optimum),
        "parabola": {
            "center": float(np.exp(profile.log_f.mean())),
            "coefficients": profile.coefficients.tolist(),
            "fitted_to": [float(value) for value in np.exp(profile.log_f[profile.fitted])],
        },
    }


def _laws(laws: Mapping[Series, Law]) -> dict[str, Any]:
    return {
        str(series): {name: each.to_json() for name, each in law.estimates.items()} | {"reason": law.reason}
        for series, law in laws.items()
    }


def _multipliers(found: Mapping[Series, Multiplier]) -> dict[str, Any]:
    return {
        str(series): {
            "average": _estimate(multiplier.average),
            "average_resampled": _estimate(multiplier.average_resampled),
            "costs": [{"cost": cost, **(_estimate(each) or {})} for cost, each in multiplier.costs],
            "reason": multiplier.reason,
        }
        for series, multiplier in found.items()
    }


def _gap(gap: Gap) -> dict[str, Any]:
    return {
        **{key: value for key, value in asdict(gap).items() if key not in ("gap", "closed")},
        "gap": _estimate(gap.gap),
        "closed": {str(series): _estimate(share) for series, share in gap.closed.items()},
    }


def _estimate(estimate: Estimate | None) -> dict[str, Any] | None:
    return estimate.to_json() if estimate else None
