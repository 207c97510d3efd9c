"""The table of the report's section on scaling: a row for each series."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.scaling.fits import Analysis
from pipeline.scaling.formats import format_flops, format_number
from pipeline.scaling.intervals import Estimate, estimate_from
from pipeline.scaling.runs import STATES, Series

MISSING = "–"

COLUMNS = (
    "arm",
    "runs",
    "diverged, failed",
    "lowest loss",
    "best size, FLOPs an image",
    "FLOPs of a prediction",
    "slope",
    "g",
    "a",
    "b",
    "compute multiplier",
    "data multiplier",
)


def make_table(analysis: Analysis) -> dict[str, Any]:
    """Returns the table: columns, rows of cells with text, sort key and interval, and notes.

    Loss and size are those at the largest budget that a series has.
    """
    return {
        "columns": list(COLUMNS),
        "rows": [_row(analysis, series) for series in analysis.profiles],
        "notes": [_note(analysis)],
    }


def _row(analysis: Analysis, series: Series) -> list[dict[str, Any]]:
    study, confidence = analysis.study, analysis.study.confidence
    profile = analysis.profiles[series][-1]
    loss = estimate_from(profile.log_loss, confidence)
    flops = float(np.exp(profile.log_f_opt[0]))
    is_exact = profile.is_bracketed or len(profile.log_f) == 1
    sign = "" if is_exact else "≤ " if profile.log_f_opt[0] <= profile.log_f[0] else "≥ "
    multiplier = analysis.compute_multipliers.get(series)
    data = analysis.data_multipliers.get(series)
    surface = analysis.surfaces.get(series)
    counts = {state: study.count(state, series.arm) for state in STATES}

    def law(found: Any, name: str) -> dict[str, Any]:
        return _number(found.estimates.get(name) if found else None, format_number)

    return [
        _text(str(series)),
        _value(counts["finished"], str(counts["finished"])),
        _value(counts["diverged"] + counts["failed"], f"{counts['diverged']}, {counts['failed']}"),
        _number(loss and loss.exp(), lambda value: f"{value:.3f}"),
        _value(flops, f"{sign}{format_flops(flops)}"),
        _value(*_test_flops(flops, series, sign)),
        law(analysis.slopes.get(series), "slope"),
        law(analysis.frontiers.get(series), "g"),
        law(surface, "a"),
        law(surface, "b"),
        _number(multiplier.average, format_number) if multiplier else _value(1.0, "1"),
        _number(data.average, format_number) if data else _text(MISSING if series != analysis.baseline else "1"),
    ]


def _test_flops(flops: float, series: Series, sign: str) -> tuple[float, str]:
    total = flops * (2 if series.averaged else 1)
    return total, f"{sign}{format_flops(total)}"


def _number(estimate: Estimate | None, formatter: Callable[[float], str]) -> dict[str, Any]:
    if estimate is None:
        return {"text": MISSING, "sort": None, "spread": ""}
    low, high = (formatter(b) if np.isfinite(b) else None for b in (estimate.low, estimate.high))
    open_side = f"{low} or more" if low else f"{high} or less" if high else "no bound"
    known = bool(np.isfinite(estimate.value))
    return {
        "text": formatter(estimate.value) if known else "not reached",
        "sort": estimate.value if known else None,
        "spread": f"{low} to {high}" if low and high else open_side,
    }


def _value(value: float, text: str) -> dict[str, Any]:
    return {"text": text, "sort": value, "spread": ""}


def _text(text: str) -> dict[str, Any]:
    return {"text": text, "sort": text if text != MISSING else None, "spread": ""}


def _note(analysis: Analysis) -> str:
    base = analysis.study.baseline
    return (
        "Lowest loss: validation cross-entropy in nats at the largest budget, at the best of the sizes tried. With ≤ "
        "or ≥ it is the smallest or the largest tried: the optimum was not found. Slope: -d log L / d log C over the "
        "budgets. g: L = E0 + K C^-g. a, b: L = E0 + A F^-a + B D^-b. Multiplier: how many times the compute, or the "
        f"unique images, {base} needs for the same loss; above 1 the arm is better than {base}. {MISSING}: not "
        "identified or not measured, with the reason below."
    )
