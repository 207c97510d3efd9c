"""The figure at the top of the report: top-1 against what an image costs, in FLOPs and in measured time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import matplotlib

from pipeline.base.plotting import MATPLOTLIB_STYLE, RenderedFigure, render_figure
from pipeline.reporting.figures import run_rows
from pipeline.reporting.run_results import RunResult, group_by_seed
from pipeline.reporting.scatter import Estimate, Estimator, Scatter, draw_panels, make_marks, mean_of, quartiles_over

_COLUMNS = (
    "val/top1_pct",
    "val/top1_low_pct",
    "val/top1_high_pct",
    "complexity/gflops",
    "perf/forward_img_per_s",
    "perf/forward_img_per_s_q1",
    "perf/forward_img_per_s_q3",
)


def draw_lead_figure(results: Sequence[RunResult], flops: tuple[float, str]) -> RenderedFigure:
    """Draws both panels, with X joined to its E and, lighter, to its H and S. Runs with tuned recipes are left out.

    Args:
        flops: divisor and unit of FLOPs, such as (1e9, "GFLOPs").
    """
    caption = _caption(results)
    results = [result for result in results if result.own_recipe_run is None]
    per_flop, flop_unit = flops
    per_ms, time_unit = _time_unit(results)
    top1 = _clip_diverged(results)

    def describe(result: RunResult) -> str:
        """Returns a label for X and for a network without X, and for a point that is not where it belongs."""
        if not result.converged and result.top1_pct is not None:
            return f"{result.label} at {result.top1_pct:.0f}%"
        return "" if result.baseline else short_name(result, results)

    costs = {
        f"{flop_unit} per image": mean_of(lambda r: r.flops and r.flops / per_flop),
        f"{time_unit} per image, measured": quartiles_over(lambda r: [per_ms * ms for ms in r.ms_per_img]),
    }
    panels = [
        Scatter(
            make_marks(results, cost, top1, describe),
            xlabel=xlabel,
            ylabel="validation top-1 (%)",
            join=True,
            from_zero=True,
            percent=True,
        )
        for xlabel, cost in costs.items()
    ]
    with matplotlib.rc_context(MATPLOTLIB_STYLE):
        return render_figure(
            "accuracy_vs_cost",
            "Accuracy against the cost of an image",
            caption,
            draw_panels(*panels),
            run_rows(results, *_COLUMNS),
            panels=[draw_panels(panel) for panel in panels],
        )


def short_name(result: RunResult, results: Sequence[RunResult]) -> str:
    """Returns the paper's name of a network if no other group of `results` has it, else the run's name."""
    names = Counter(members[0].name for members in group_by_seed(results))
    return result.name if names[result.name] == 1 else result.group


def _caption(results: Sequence[RunResult]) -> str:
    conditions = sorted({result.throughput_conditions for result in results if result.throughput})
    return (
        "Further left is cheaper, further up is more accurate. A line joins X to its E(X), a lighter one to its H(X)"
        + " and to S(X), the same weights averaged over a group" * any(result.variant == "S" for result in results)
        + ". "
        "Vertical bars: 95% intervals of top-1. Horizontal bars: quartiles of the passes' times"
        + f" ({'; '.join(conditions)})" * bool(conditions)
        + "."
        + " Runs whose recipe a sweep found are in the table." * any(result.own_recipe_run for result in results)
        + " Hollow: did not converge; drawn at the edge if far below the rest."
        * (not all(result.converged for result in results))
    )


def _time_unit(results: Sequence[RunResult]) -> tuple[float, str]:
    """Returns the number of units in a millisecond, and the unit."""
    times = [ms for result in results for ms in result.ms_per_img]
    return (1e3, "µs") if times and max(times) < 1 else (1.0, "ms")


def _estimate_top1(members: Sequence[RunResult]) -> Estimate | None:
    """Returns the top-1 of all seeds together with its 95 % interval; without predictions their mean alone."""
    if pooled := members[0].pooled:
        return Estimate(pooled.top1_pct, *pooled.top1_interval)
    return mean_of(lambda r: r.top1_pct)(members)


def _clip_diverged(results: Sequence[RunResult]) -> Estimator:
    """Returns an estimator of top-1, clipped for diverged runs so that the converged runs stay distinguishable."""
    groups = group_by_seed(results)
    good = [found for members in groups if _has_converged(members) and (found := _estimate_top1(members))]
    lowest, highest = min((e.low for e in good), default=0.0), max((e.high for e in good), default=100.0)
    edge = lowest - max(1.0, 0.4 * (highest - lowest))

    def estimate(members: Sequence[RunResult]) -> Estimate | None:
        found = _estimate_top1(members)
        if found is None or _has_converged(members) or found.value >= edge:
            return found
        return Estimate(edge, edge, edge)

    return estimate


def _has_converged(members: Sequence[RunResult]) -> bool:
    return any(member.converged for member in members)
