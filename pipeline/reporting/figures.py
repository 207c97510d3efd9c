"""The figures below the comparison table: FLOPs against parameters, throughput gain, training curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipeline.base.plotting import MATPLOTLIB_STYLE, RenderedFigure, mark_gid, render_figure
from pipeline.reporting.figure_style import COLORS, DASHES, mark_empty
from pipeline.reporting.run_results import RunResult, SeedSpread, group_by_seed
from pipeline.reporting.scatter import Scatter, draw_panels, make_marks, mean_of, quartiles_over


def draw_figures(
    results: Sequence[RunResult], flops: tuple[float, str], params: tuple[float, str]
) -> list[RenderedFigure]:
    """Draws the figures. The seeds of one run form one point, or one line with a band.

    Args:
        flops, params: divisor and unit of their axes, such as (1e9, "GFLOPs").
    """
    per_flop, flop_unit = flops
    per_param, param_unit = params
    base = {result.run: result for result in results}

    def scaled_flops(result: RunResult) -> float | None:
        return result.flops and result.flops / per_flop

    def scaled_params(result: RunResult) -> float | None:
        return result.params and result.params / per_param

    def baseline_flops(result: RunResult) -> float | None:
        return scaled_flops(base[result.baseline]) if result.baseline else None

    with matplotlib.rc_context(MATPLOTLIB_STYLE):
        return [
            render_figure(
                "flops_vs_params",
                "FLOPs against parameters",
                "Points on one line through the origin have the same FLOPs per parameter (the paper's figure 5).",
                draw_panels(
                    Scatter(
                        make_marks(results, mean_of(scaled_params), mean_of(scaled_flops)),
                        xlabel=f"parameters ({param_unit})",
                        ylabel=f"{flop_unit} per image",
                        proportional=True,
                    )
                ),
                run_rows(results, "complexity/params_m", "complexity/gflops"),
            ),
            render_figure(
                "throughput_gain",
                "Throughput gain against FLOPs",
                "Forward throughput of E(X) and H(X) relative to their X, by the FLOPs of X (the paper's figure 6). "
                "Below 0 they are slower than X. Bars: quartiles of the ratios of neighbouring passes.",
                draw_panels(
                    Scatter(
                        make_marks(_trained(results), mean_of(baseline_flops), quartiles_over(_gains_pct)),
                        xlabel=f"{flop_unit} per image, of X",
                        ylabel="throughput gain over X (%)",
                        hline=0,
                    )
                ),
                run_rows(
                    results,
                    "complexity/gflops",
                    "complexity/flop_ratio",
                    "perf/throughput_ratio",
                    "perf/throughput_ratio_q1",
                    "perf/throughput_ratio_q3",
                ),
            ),
            render_figure(
                "training_curves",
                "Training curves",
                "Validation top-1 and training loss after each epoch."
                + " Bands: lowest to highest of several seeds." * (len(group_by_seed(results)) < len(results)),
                _plot_curves(results),
                [
                    {
                        "run": r.run,
                        "group": r.group,
                        "seed": r.seed,
                        "epoch": int(row["epoch"]) + 1,
                        "val/top1_pct": row["val/top1_pct"],
                        "train/loss": row["train/loss"],
                    }
                    for r in results
                    for row in r.history
                ],
            ),
        ]


def _trained(results: Sequence[RunResult]) -> list[RunResult]:
    """Returns the results without those of symmetrized runs, which save nothing."""
    return [result for result in results if result.variant != "S"]


def _gains_pct(result: RunResult) -> list[float]:
    return [100 * (ratio - 1) for ratio in result.throughput_ratios]


def run_rows(results: Sequence[RunResult], *numbers: str) -> list[dict[str, Any]]:
    """Returns one row per run, with metrics under their names in metrics.json."""
    known = ("run", "group", "seed", "model", "family", "variant", "converged")
    return [
        {key: getattr(r, key) for key in known} | {name: r.all_metrics().get(name) for name in numbers} for r in results
    ]


def _plot_curves(results: Sequence[RunResult]) -> Figure:
    figure = Figure(figsize=(5.4, 6.6), layout="constrained")
    top1, loss = figure.subplots(2, 1, sharex=True)
    drawn = [known for members in group_by_seed(results) if (known := [r for r in members if r.history])]
    for axes, column in ((top1, "val/top1_pct"), (loss, "train/loss")):
        for members in drawn:
            result, curve = members[0], [_spread_at(members, column, epoch) for epoch in range(_epochs(members))]
            color, epochs = COLORS[result.family], range(1, len(curve) + 1)
            if len(members) > 1:
                axes.fill_between(
                    epochs, [at.low for at in curve], [at.high for at in curve], color=color, alpha=0.15, linewidth=0
                )
            tooltip = (
                f"{result.label}: {curve[-1].mean:.4g} after {len(curve)} epochs, best {_best_value(curve, column):.4g}"
            )
            axes.plot(
                epochs,
                [at.mean for at in curve],
                color=color,
                linestyle=DASHES[result.variant],
                linewidth=1.7,
                gid=mark_gid(result.group, tooltip),
            )
    top1.set(ylabel="validation top-1 (%)")
    loss.set(xlabel="epoch", ylabel="training loss")
    if not drawn:
        mark_empty(top1)
        return figure
    handles = [
        Line2D([], [], color=COLORS[r.family], linestyle=DASHES[r.variant], linewidth=1.7, label=r.label)
        for r, *_ in drawn
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8.5, handlelength=2.6)
    return figure


def _epochs(members: Sequence[RunResult]) -> int:
    """Number of epochs that all members have."""
    return min(len(member.history) for member in members)


def _spread_at(members: Sequence[RunResult], column: str, epoch: int) -> SeedSpread:
    """Spread of a column of history.csv over the members."""
    values = [member.history[epoch][column] for member in members]
    return SeedSpread(sum(values) / len(values), min(values), max(values), len(values))


def _best_value(curve: Sequence[SeedSpread], column: str) -> float:
    best = min if column.endswith("loss") else max
    return best(at.mean for at in curve)
