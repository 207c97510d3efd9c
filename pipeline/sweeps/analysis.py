"""Analysis of a sweep: the Pareto front, differences beyond the spread over seeds, and findings as sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns the indices of the points (cost, value) that no other point dominates.

    Points that are equal in both are all on the front.
    """
    return [
        number
        for number, (cost, value) in enumerate(points)
        if not any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points)
    ]


def beyond_spread(better: Sequence[float], worse: Sequence[float]) -> bool:
    """Whether every value in `better` is above every value in `worse`, so that the ranges do not overlap.

    For n and n values from the same distribution, this happens by chance once in (2n choose n) cases: 6 for n = 2,
    20 for n = 3. A single value has no spread, so the result is False.
    """
    return len(better) > 1 and len(worse) > 1 and min(better) > max(worse)


def describe_recipe_finding(finding: Mapping[str, Any]) -> str:
    """Returns a run's finding as a sentence."""
    best, own = finding["best"], finding["own"]
    if best is None:
        return "no trial was trained to its end"
    if best["is_own"]:
        return f"nothing better than its own recipe, at top-1 {best['top1_pct']:.1f}%"
    search = f"top-1 {best['top1_pct']:.1f}%" + (
        "" if own["top1_pct"] is None else f" against {own['top1_pct']:.1f}% for its own recipe"
    )
    confirmed = finding["confirmed"]
    pairs = [[value for value in confirmed[side] if value is not None] for side in ("best", "start")]
    if not all(pairs):
        return f"{search}, not confirmed under further seeds"
    ranges = [format_top1_range(values) for values in pairs]
    seeds = f"under {len(confirmed['seeds'])} further seed{'s' if len(confirmed['seeds']) > 1 else ''}"
    verdict = (
        "a gain beyond the spread over seeds"
        if finding["beyond_spread"]
        else "worse"
        if beyond_spread(pairs[1], pairs[0])
        else "nothing beyond the spread over seeds"
    )
    return f"{search} in the search; {seeds} {ranges[0]} against {ranges[1]}: {verdict}"


def format_top1_range(values: Sequence[float]) -> str:
    """Formats the range of several top-1 values."""
    low, high = min(values), max(values)
    return f"{low:.1f}%" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}%"


def describe_split_finding(found: Mapping[str, Any]) -> str:
    """Returns a family's finding as a sentence."""
    best = found["best"]
    if best is None:
        return f"no split within {found['flop_budget']:.0%} of X's FLOPs was trained to its end"
    what = (
        f"within {found['flop_budget']:.0%} of X's FLOPs the best split is k = {best['k']}, at top-1 "
        f"{format_top1_range(best['top1'])} and {best['flop_fraction']:.0%} of the FLOPs"
    )
    alike = f"; not told apart from k = {', '.join(map(str, found['alike']))} by the spread over seeds" * bool(
        found["alike"]
    )
    above = f"; beyond the spread, k = {', '.join(map(str, found['above']))} reach more for more FLOPs" * bool(
        found["above"]
    )
    return what + alike + above
