"""The figure of the paper's S sizes: how much of the saved FLOPs becomes speed, on each device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from pipeline.base.plotting import MATPLOTLIB_STYLE, RenderedFigure, mark_gid, render_figure
from pipeline.reporting.figure_style import COLORS
from pipeline.reporting.paper_sizes import Measurement, SizeComparison

_HALF_HEIGHT = 0.3


def draw_paper_sizes(measurements: Sequence[Measurement]) -> RenderedFigure:
    """Draws a bar from 1, as fast as X, to the throughput ratio E/X, over a pale bar to the FLOP ratio X/E."""
    with matplotlib.rc_context(MATPLOTLIB_STYLE):
        return render_figure(
            "paper_sizes",
            "Speed of E(X) at the paper's S sizes",
            "A full bar reaches from 1, as fast as X, to the throughput of E(X) over that of X. The pale bar reaches "
            "to the ratio of their FLOPs, where all saved FLOPs would be saved time. Whiskers: "
            + "; ".join(f"{measurement.bounds} on {measurement.name}" for measurement in measurements)
            + ".",
            _draw(measurements),
            [_row(measurement, pair) for measurement in measurements for pair in measurement.comparisons],
        )


def mark_name(measurement: Measurement, pair: SizeComparison) -> str:
    """Returns what joins a bar with its row of the table."""
    return f"{pair.e_name} on {measurement.device}"


def _draw(measurements: Sequence[Measurement]) -> Figure:
    num_rows = sum(len(measurement.comparisons) for measurement in measurements)
    figure = Figure(figsize=(5.4, 1.1 + 0.36 * num_rows + 0.5 * len(measurements)), layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=False, axis="y")
    axes.axvline(1, color="#777777", linewidth=1, zorder=3)
    height, ticks = 0.0, []
    for measurement in measurements:
        axes.annotate(
            measurement.name,
            (0, height),
            (4, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color="#222222",
            weight="bold",
            zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )
        height -= 0.95
        for pair in measurement.comparisons:
            _draw_bar(axes, measurement, pair, height)
            ticks.append((height, pair.e_name))
            height -= 0.9
        height -= 0.15
    ratios = [pair.ratio for measurement in measurements for pair in measurement.comparisons]
    flop_ratios = [pair.flop_ratio for measurement in measurements for pair in measurement.comparisons]
    axes.set_xlim(min(0.75, *(r.first - 0.12 for r in ratios)), max(*(r.third for r in ratios), *flop_ratios) + 0.38)
    axes.set_ylim(height + 0.4, 0.6)
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("throughput of E(X) over X")
    figure.legend(
        handles=[
            Patch(facecolor="#666666", label="measured"),
            Patch(facecolor="#666666", alpha=0.22, label="if all saved FLOPs were saved time"),
            Line2D([], [], color="#777777", linewidth=1, label="as fast as X"),
        ],
        loc="outside lower center", ncols=3, fontsize=8.5, handlelength=1.2, columnspacing=1.2,
    )  # fmt: skip
    return figure


def _draw_bar(axes: Any, measurement: Measurement, pair: SizeComparison, y: float) -> None:
    color, ratio = COLORS[pair.family], pair.ratio
    axes.barh(y, pair.flop_ratio - 1, left=1, height=2 * _HALF_HEIGHT, color=color, alpha=0.22, linewidth=0)
    [bar] = axes.barh(y, ratio.median - 1, left=1, height=2 * _HALF_HEIGHT, color=color, linewidth=0, zorder=2)
    bar.set_gid(
        mark_gid(
            mark_name(measurement, pair),
            f"{pair.e_name} on {measurement.device}: {ratio.median:.2f} ({ratio.first:.2f} to {ratio.third:.2f}) times "
            f"the throughput of {pair.x_name}; FLOP ratio {pair.flop_ratio:.2f}",
        )
    )
    axes.plot([ratio.first, ratio.third], [y, y], color="#222222", linewidth=1.3, marker="|", markersize=7, zorder=4)
    axes.annotate(
        f"{ratio.median:.2f} of {pair.flop_ratio:.2f}", (max(ratio.third, pair.flop_ratio), y), (5, 0),
        textcoords="offset points", va="center", fontsize=9, color="#222222",
    )  # fmt: skip


def _row(measurement: Measurement, pair: SizeComparison) -> dict[str, Any]:
    return {
        "device": measurement.device,
        "conditions": measurement.conditions,
        "model": pair.e_name,
        "x_img_per_s": pair.x_img_per_s,
        "e_img_per_s": pair.e_img_per_s,
        "throughput_ratio": pair.ratio.median,
        "throughput_ratio_low": pair.ratio.first,
        "throughput_ratio_high": pair.ratio.third,
        "bounds": measurement.bounds,
        "flop_ratio": pair.flop_ratio,
        "share": pair.share,
    }
