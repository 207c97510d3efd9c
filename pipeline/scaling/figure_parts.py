"""What the figures of a scaling study share: colors of arms, axes, bands, legends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from pipeline.scaling.formats import format_flops

Fits = Mapping[str, Any]

Row = Mapping[str, Any]

# Okabe and Ito's palette, distinguishable with every common color blindness.
_COLORS = ("#0072B2", "#56B4E9", "#D55E00", "#CC79A7", "#009E73", "#E69F00", "#666666")

_MIN_TICKS, _MAX_TICKS = 3, 6


def color_of(fits: Fits, arm: str) -> str:
    """Returns the color of an arm, by its place among the arms."""
    return _COLORS[list(fits["study"]["runs"]).index(arm) % len(_COLORS)]


def dashes_of(row: Row) -> Literal["-", "--"]:
    """Returns the line style of a series: dashed where predictions are averaged."""
    return "--" if row["averaged"] else "-"


def group_by_series(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Returns the rows of each series, in their order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["series"], []).append(row)
    return groups


def bounds(estimate: Row) -> tuple[float, float]:
    """Returns the interval of an estimate; an open side is infinite."""
    low, high = estimate["low"], estimate["high"]
    return -np.inf if low is None else low, np.inf if high is None else high


def draw_band(axes: Axes, x: Sequence[float], estimates: Sequence[Row], color: str, alpha: float = 0.14) -> None:
    """Draws the intervals of a curve; an open side reaches beyond the axes, whose limits it leaves alone."""
    if len(x) < 2:
        return
    low, high = np.array([bounds(estimate) for estimate in estimates]).T
    finite = np.array([*low[np.isfinite(low)], *high[np.isfinite(high)]])
    if not len(finite):
        return
    low = np.where(np.isfinite(low), low, finite.min() / 10 if finite.min() > 0 else finite.min() - 10)
    high = np.where(np.isfinite(high), high, finite.max() * 10 if finite.max() > 0 else finite.max() + 10)
    is_open = np.array([None in (e["low"], e["high"]) for e in estimates])
    axes.fill_between(x, low, high, color=color, alpha=alpha, linewidth=0)
    for place, at_low, at_high, opened in zip(x, low, high, is_open, strict=True):
        if opened:
            axes.plot([place, place], [at_low, at_high], color=color, alpha=0.35, linewidth=1, linestyle=":")


def draw_series_band(axes: Axes, x: Sequence[float], estimates: Sequence[Row], row: Row, color: str) -> None:
    """Draws the intervals of the series that `row` is of, lighter where predictions are averaged."""
    draw_band(axes, x, estimates, color, alpha=0.07 if row["averaged"] else 0.14)


def cost_axis(axes: Axes, costs: Iterable[float], label: str, unit: str = "FLOPs") -> None:
    """Makes a logarithmic x axis with ticks at the costs that were tried."""
    _widen(axes, "x")
    ticks = sorted(set(costs))
    while len(ticks) > _MAX_TICKS:
        ticks = ticks[::-1][::2][::-1]
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, unit)))
    axes.set_xlabel(label)


def log_axis(axes: Axes, which: str, label: str) -> None:
    """Makes a logarithmic axis with plain numbers at 1, 2, 5 and their like."""
    _widen(axes, which)
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(FixedLocator(_log_ticks(*sorted(getattr(axes, f"get_{which}lim")()))))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1e5 else _short(value)))
    getattr(axes, f"set_{which}label")(label)


def flops_axis(axes: Axes, label: str) -> None:
    """Makes a logarithmic x axis of FLOPs with ticks at 1, 3, 10 and so on."""
    log_axis(axes, "x", label)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, "FLOPs")))


def add_legend(figure: Figure, fits: Fits, rows: Iterable[Row], extra: Sequence[Line2D] = ()) -> None:
    """Adds a legend of the series below the figure."""
    first = {name: found[0] for name, found in group_by_series(rows).items()}
    handles = [
        Line2D([], [], color=color_of(fits, row["arm"]), linestyle=dashes_of(row), linewidth=1.7, label=name)
        for name, row in first.items()
    ]
    handles += extra
    if handles:
        columns = min(len(handles), 4)
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8.5, handlelength=2.4)


def count_left_out(fits: Fits, arm: str | None = None) -> str:
    """Returns `2 diverged, 1 failed: left out`; an empty string if no run was."""
    counts = [count for name, count in fits["study"]["runs"].items() if arm in (None, name)]
    parts = [f"{sum(c[state] for c in counts)} {state}" for state in ("diverged", "failed")]
    return f"{', '.join(part for part in parts if part[0] != '0')}: left out" if any(p[0] != "0" for p in parts) else ""


def note_left_out(axes: Axes, fits: Fits, arm: str | None = None) -> None:
    """Writes above the axes how many runs are left out."""
    axes.set_title(count_left_out(fits, arm), loc="right", color="#a33333", fontsize=8)


def _log_ticks(low: float, high: float) -> list[float]:
    """Returns three to seven ticks between the ends: multiples of powers of ten, or evenly spaced on a short axis."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks: list[float] = []
    for multiples in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
        ticks = [m * 10.0**decade for decade in decades for m in multiples if low <= m * 10.0**decade <= high]
        if len(ticks) >= _MIN_TICKS:
            return ticks
    return [float(tick) for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]


def _widen(axes: Axes, which: str) -> None:
    """Sets the limits of an axis on which all points are at one value, which a logarithmic axis cannot do itself."""
    low, high = getattr(axes.dataLim, f"interval{which}")
    if np.isfinite(low) and high <= low * (1 + 1e-9):
        getattr(axes, f"set_{which}lim")(low / 1.5, low * 1.5)


def _tick(value: float, unit: str) -> str:
    return format_flops(value).replace("FLOPs", "").strip() if unit == "FLOPs" else _short(value)


def _short(value: float) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value:,.0f}" if value >= 1 else f"{value:g}"
