"""The figure of the gap between baseline and equivariant arm against epochs, and of the share that others close."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from pipeline.base.plotting import mark_gid
from pipeline.scaling.figure_parts import (
    Fits,
    add_legend,
    color_of,
    dashes_of,
    draw_band,
    draw_series_band,
    log_axis,
    note_left_out,
)

_TITLES = {"data_gaps": "fewer unique images", "budget_gaps": "larger budgets"}


SHARES = (-0.5, 2.0)
"""Range of the axis of shares: where the gap is small, they can be anything."""


def rows(fits: Fits) -> list[dict[str, Any]]:
    """Returns the plotted data: a row for each gap, and one for each share of it."""
    found = []
    for kind, title in _TITLES.items():
        for gap in fits[kind]:
            place = {"varied": title, **{key: gap[key] for key in ("budget", "unique_images", "epochs")}}
            found.append({**place, "series": fits["study"]["equivariant"], "gap": gap["gap"]})
            found += [{**place, "series": name, "closed": share} for name, share in gap["closed"].items() if share]
    return found


def draw(fits: Fits) -> Figure:
    """Draws a column for the data study and one for the budgets, where they have gaps."""
    kinds = [kind for kind in _TITLES if any(gap["gap"] for gap in fits[kind])]
    series = _series_rows(fits)
    has_shares = len(series) > 1
    figure = Figure(figsize=(1.0 + 2.7 * max(len(kinds), 1), 5.0 if has_shares else 3.2), layout="constrained")
    grid = figure.subplots(1 + has_shares, max(len(kinds), 1), squeeze=False, sharey="row")
    for column, kind in enumerate(kinds):
        _draw_gaps(grid[0, column], fits, kind)
        if has_shares:
            _draw_shares(grid[1, column], fits, kind)
        grid[0, column].set_title(_TITLES[kind], fontsize=10, loc="left")
        for axes in grid[:, column]:
            log_axis(axes, "x", "")
        grid[-1, column].set_xlabel(f"epochs of {fits['study']['baseline']}")
    grid[0, 0].set_ylabel("gap (nats)")
    if has_shares:
        grid[1, 0].set_ylabel("share of the gap closed")
        low, high = grid[1, 0].get_ylim()
        grid[1, 0].set_ylim(max(low, SHARES[0]), min(high, SHARES[1]))
        grid[1, 0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))
    note_left_out(grid[0, -1], fits)
    add_legend(figure, fits, series)
    return figure


def _draw_gaps(axes: Any, fits: Fits, kind: str) -> None:
    axes.axhline(0, color="#888888", linewidth=1)
    gaps = sorted((gap for gap in fits[kind] if gap["gap"]), key=lambda gap: gap["epochs"])
    name = fits["study"]["equivariant"]
    color = color_of(fits, name)
    x = [gap["epochs"] for gap in gaps]
    draw_band(axes, x, [gap["gap"] for gap in gaps], color)
    axes.plot(x, [gap["gap"]["value"] for gap in gaps], color=color, linewidth=1.5)
    for gap in gaps:
        low, high = gap["gap"]["low"], gap["gap"]["high"]
        axes.plot([gap["epochs"]] * 2, [low, high], color=color, linewidth=1, alpha=0.6)
        text = f"gap {gap['gap']['value']:.3g} ({low:.3g} to {high:.3g}) at {gap['epochs']:.3g} epochs"
        face = color if gap["has_seeds"] else "white"
        axes.plot(gap["epochs"], gap["gap"]["value"], "o", color=color, markerfacecolor=face, gid=mark_gid(name, text))


def _draw_shares(axes: Any, fits: Fits, kind: str) -> None:
    for level in (0, 1):
        axes.axhline(level, color="#888888", linewidth=1)
    for row in _series_rows(fits)[1:]:
        gaps = sorted((g for g in fits[kind] if g["closed"].get(row["series"])), key=lambda gap: gap["epochs"])
        shares = [gap["closed"][row["series"]] for gap in gaps]
        x, color = [gap["epochs"] for gap in gaps], color_of(fits, row["arm"])
        draw_series_band(axes, x, shares, row, color)
        axes.plot(
            x,
            [share["value"] for share in shares],
            color=color,
            marker="o",
            markersize=4,
            linestyle=dashes_of(row),
            linewidth=1.5,
            gid=mark_gid(row["series"], row["series"]),
        )


def _series_rows(fits: Fits) -> list[dict[str, Any]]:
    """The equivariant arm, then the series of which shares are drawn: augmentation, and what is averaged."""
    study = fits["study"]
    first = {"series": study["equivariant"], "arm": study["equivariant"], "averaged": False}
    shown = {
        (row["series"], row["arm"], row["averaged"])
        for kind in _TITLES
        for gap in fits[kind]
        for row in fits["cells"]
        if gap["closed"].get(row["series"]) and (row["averaged"] or row["arm"] == study["augmented"])
    }
    ordered = sorted(shown, key=lambda each: (each[2], each[0]))
    return [first, *({"series": name, "arm": arm, "averaged": averaged} for name, arm, averaged in ordered)]
