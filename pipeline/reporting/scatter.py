"""Draws runs as points with their intervals. Several seeds of a run are one point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from pipeline.base.plotting import mark_gid
from pipeline.reporting.figure_labels import Point, place_labels
from pipeline.reporting.figure_style import COLORS, MARKERS, add_legend, mark_empty
from pipeline.reporting.run_results import RunResult, group_by_seed, seed_spread
from pipeline.reporting.speed import quartiles_of
from pipeline.reporting.table import group_label


class Estimate(NamedTuple):
    """A value and its interval; both bounds are the value if it has none."""

    value: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        return self.low < self.high

    def __str__(self) -> str:
        return f"{self.value:.4g}" + (f" ({self.low:.4g} to {self.high:.4g})" if self.has_interval else "")


Estimator = Callable[[Sequence[RunResult]], Estimate | None]
"""Takes all seeds of a run."""


@dataclass(frozen=True)
class Mark:
    """A run, or all seeds of it, in a figure."""

    members: Sequence[RunResult]
    x: Estimate
    y: Estimate
    label: str = ""
    """Text beside the point; none if it is empty."""

    @property
    def result(self) -> RunResult:
        return self.members[0]

    @property
    def color(self) -> str:
        return COLORS[self.result.family]


@dataclass(frozen=True)
class Scatter:
    """Marks with the names of their axes."""

    marks: Sequence[Mark]
    xlabel: str
    ylabel: str
    join: bool = False
    """Draw a line from each network that has an X to its X."""
    proportional: bool = False
    """Show the origin, or make both axes logarithmic."""
    from_zero: bool = False
    """Start the x axis at 0 unless it is logarithmic."""
    hline: float | None = None
    """Height of a horizontal line."""
    percent: bool = False
    """End the y axis at 100."""


def make_marks(
    results: Sequence[RunResult], x: Estimator, y: Estimator, label: Callable[[RunResult], str] = lambda r: r.label
) -> list[Mark]:
    """Returns a mark for each run, or for all seeds of a run, that has both values."""
    estimated = [(members, x(members), y(members)) for members in group_by_seed(results)]
    return [
        Mark(members, at, height, label(members[0]))
        for members, at, height in estimated
        if at is not None and height is not None
    ]


def mean_of(value: Callable[[RunResult], float | None]) -> Estimator:
    """Returns an estimator: the mean over the seeds, without an interval."""

    def estimate(members: Sequence[RunResult]) -> Estimate | None:
        found = seed_spread(members, value)
        return found and Estimate(found.mean, found.mean, found.mean)

    return estimate


def quartiles_over(values: Callable[[RunResult], Sequence[float]]) -> Estimator:
    """Returns an estimator: the median of the values of all seeds, and their quartiles."""

    def estimate(members: Sequence[RunResult]) -> Estimate | None:
        found = quartiles_of([value for member in members for value in values(member)])
        return found and Estimate(found.median, found.first, found.third)

    return estimate


def draw_panels(*scatters: Scatter) -> Figure:
    """Draws scatters side by side in one figure, with a legend."""
    figure = Figure(figsize=(5.4 * len(scatters), 4.4), layout="constrained")
    panels = list(zip(figure.subplots(1, len(scatters), squeeze=False)[0], scatters, strict=True))
    drawn = [(axes, scatter, _plot_scatter(axes, scatter)) for axes, scatter in panels]
    shown = [mark.result for scatter in scatters for mark in scatter.marks]
    if shown:
        add_legend(figure, shown)
    for axes, scatter, (positions, lines) in drawn:  # at last, because the legend changes the axes
        labels = zip(scatter.marks, positions, strict=True)
        place_labels(
            figure, axes, [(mark.label, at, mark.color) for mark, at in labels if mark.label], positions, lines
        )
    return figure


def _plot_scatter(axes: Axes, scatter: Scatter) -> tuple[list[Point], list[tuple[Point, Point]]]:
    """Draws points, intervals and joining lines, without labels. Returns the points, and all lines."""
    marks = scatter.marks
    axes.set(xlabel=scatter.xlabel, ylabel=scatter.ylabel)
    if not marks:
        mark_empty(axes)
        return [], []
    _set_scales(axes, scatter)
    positions = [(mark.x.value, mark.y.value) for mark in marks]
    at = {member.run: position for mark, position in zip(marks, positions, strict=True) for member in mark.members}
    if scatter.hline is not None:
        axes.axhline(scatter.hline, color="#999999", linewidth=1)
    lines = []
    for mark, (x, y) in zip(marks, positions, strict=True):
        baseline = mark.result.baseline
        if scatter.join and baseline in at:
            lines.append((at[baseline], (x, y)))
            is_e = mark.result.variant == "E"
            width, alpha = (2.0, 0.75) if is_e else (1.2, 0.35)
            axes.plot(*zip(*lines[-1], strict=True), color=mark.color, linewidth=width, alpha=alpha, zorder=2)
        bars = [((x, mark.y.low), (x, mark.y.high))] * mark.y.has_interval
        bars += [((mark.x.low, y), (mark.x.high, y))] * mark.x.has_interval
        for bar in bars:
            cap = "_" if bar[0][0] == bar[1][0] else "|"
            style = {"linewidth": 1.3, "alpha": 0.6, "marker": cap, "markersize": 6, "zorder": 3}
            axes.plot(*zip(*bar, strict=True), color=mark.color, **style)
        lines += bars
    for mark, position in zip(marks, positions, strict=True):
        filled = any(member.converged for member in mark.members)
        axes.plot(
            *position,
            MARKERS[mark.result.variant],
            color=mark.color,
            markerfacecolor=mark.color if filled else "white",
            markeredgecolor="white" if filled else mark.color,
            markeredgewidth=0.8 if filled else 1.3,
            markersize=9,
            zorder=4,
            gid=mark_gid(mark.result.group, _tooltip(mark, scatter)),
        )
    return positions, lines


def _tooltip(mark: Mark, scatter: Scatter) -> str:
    """Returns what the page says about a mark."""
    name = mark.result.label if len(mark.members) == 1 else group_label(mark.members)
    return f"{name}: {scatter.xlabel} {mark.x}; {scatter.ylabel} {mark.y}"


def _set_scales(axes: Axes, scatter: Scatter) -> None:
    """Sets limits with room for labels, and logarithmic axes if x spans more than a decade."""
    xs = [x for mark in scatter.marks for x in (mark.x.low, mark.x.high)]
    ys = [y for mark in scatter.marks for y in (mark.y.low, mark.y.high)] + [0] * (scatter.hline == 0)
    if min(xs) > 0 and max(xs) > 10 * min(xs):
        axes.set(xscale="log", yscale="log" if scatter.proportional else "linear")
        axes.set_xlim(min(xs) / 1.5, max(xs) * 1.5)
        for axis in (axes.xaxis, axes.yaxis) if scatter.proportional else (axes.xaxis,):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
    elif scatter.proportional or scatter.from_zero:
        axes.set_xlim(0, max(xs) * 1.16)
    else:
        margin = 0.14 * (max(xs) - min(xs)) or 0.1 * abs(max(xs)) or 1.0
        axes.set_xlim(min(xs) - margin, max(xs) + margin)
    if axes.get_yscale() == "log":
        axes.set_ylim(min(ys) / 1.5, max(ys) * 1.5)
    else:
        margin = 0.12 * (max(ys) - min(ys)) or 0.1 * abs(max(ys)) or 1.0
        low, high = min(ys) - margin, max(ys) + margin
        axes.set_ylim(0 if scatter.proportional else low, min(high, 100) if scatter.percent else high)
