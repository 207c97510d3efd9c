"""The figures of `symmetrization.py`, made from its CSV files."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.robustness import GROUPS, NETWORKS
from benchmarks.symmetrization_tables import Row, read_rows
from pipeline.base.plotting import MATPLOTLIB_STYLE

_COLORS = ("#666666", "#0072B2", "#56B4E9", "#CC79A7", "#E69F00", "#009E73")  # Okabe and Ito's


def draw_figures(folder: Path) -> None:
    """Writes robustness.png and views.png, as far as there are results."""
    with matplotlib.rc_context(MATPLOTLIB_STYLE):
        if rows := read_rows(folder / "robustness.csv"):
            _draw_robustness(rows).savefig(folder / "robustness.png", dpi=150)
        if rows := read_rows(folder / "views.csv"):
            _draw_views(rows, read_rows(folder / "view_costs.csv")).savefig(folder / "views.png", dpi=150)


def _draw_robustness(rows: list[Row]) -> Figure:
    """A panel for each family: top-1 with its interval, by transformation, a color for each network."""
    families = list(dict.fromkeys(row["family"] for row in rows))
    figure = Figure(figsize=(4.6 * len(families), 4.2), layout="constrained")
    panels = figure.subplots(1, len(families), squeeze=False, sharey=True)[0]
    for axes, family in zip(panels, families, strict=True):
        for number, network in enumerate(NETWORKS):
            found = [row for row in rows if (row["family"], row["network"]) == (family, network)]
            at = [list(GROUPS).index(row["transformation"]) + 0.12 * (number - 2.5) for row in found]
            _errorbar(axes, at, found, _COLORS[number], network)
        axes.set(title=family, xticks=range(len(GROUPS)), xticklabels=list(GROUPS))
    panels[0].set(ylabel="top-1 (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(NETWORKS))
    return figure


def _draw_views(rows: list[Row], costs: list[Row]) -> Figure:
    """Top-1 by the number of images, and top-1 by FLOPs, a color for each design."""
    designs = list(dict.fromkeys(row["design"] for row in rows))
    figure = Figure(figsize=(9.2, 4.0), layout="constrained")
    by_number, by_cost = figure.subplots(1, 2, sharey=True)
    mflops = {(row["num_images"], row["design"]): float(row["mflops"]) for row in costs}
    for number, design in enumerate(designs):
        found = [row for row in rows if row["design"] == design]
        at = [int(row["num_images"]) + 0.06 * (number - 1) for row in found]
        _errorbar(by_number, at, found, _COLORS[2 * number + 1], design)
        if mflops:
            _errorbar(
                by_cost, [mflops[row["num_images"], design] for row in found], found, _COLORS[2 * number + 1], design
            )
    by_number.set(xlabel="images in a tuple", ylabel="top-1 (%)", xticks=sorted({int(r["num_images"]) for r in rows}))
    by_cost.set(xlabel="MFLOPs per tuple (full product: as a black box)", xscale="log" if mflops else "linear")
    figure.legend(*by_number.get_legend_handles_labels(), loc="outside lower center", ncols=len(designs))
    return figure


def _errorbar(axes: Axes, at: list[float], rows: list[Row], color: str, label: str) -> None:
    values = [float(row["top1_pct"]) for row in rows]
    below = [value - float(row["top1_low_pct"]) for value, row in zip(values, rows, strict=True)]
    above = [float(row["top1_high_pct"]) - value for value, row in zip(values, rows, strict=True)]
    axes.errorbar(at, values, yerr=[below, above], fmt="o", color=color, label=label, capsize=2, markersize=5)
