"""The figures of a scaling study, drawn from fits.json; none where there is nothing to draw.

Filled points have several seeds, hollow ones have one and no interval of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipeline.base.plotting import MATPLOTLIB_STYLE, RenderedFigure, mark_gid, render_figure
from pipeline.scaling import gap_figure
from pipeline.scaling.figure_parts import (
    Fits,
    Row,
    add_legend,
    bounds,
    color_of,
    cost_axis,
    count_left_out,
    dashes_of,
    draw_band,
    draw_series_band,
    flops_axis,
    group_by_series,
    log_axis,
    note_left_out,
)
from pipeline.scaling.formats import format_flops, format_number, percent

_LOSS = "validation cross-entropy (nats)"

_HOLLOW = Line2D([], [], color="#444444", marker="o", markerfacecolor="white", linestyle="", label="one seed")

_TRIANGLE = Line2D([], [], color="#444444", marker="^", markerfacecolor="white", linestyle="", label="not bracketed")


def draw_figures(fits: Fits) -> list[RenderedFigure]:
    """Draws all figures for which the study has points."""
    drawn = []
    level = percent(fits["study"]["confidence"])
    left_out = count_left_out(fits)
    ending = f" {left_out.capitalize()}." if left_out else ""

    def add(name: str, title: str, caption: str, figure: Figure, rows: Any) -> None:
        drawn.append(render_figure(f"scaling_{name}", f"Scaling: {title}", caption + ending, figure, _flat(rows)))

    with matplotlib.rc_context(MATPLOTLIB_STYLE):
        if fits["profiles"]:
            add(
                "loss_vs_compute",
                "loss against compute",
                "Points: every size and budget; filled with several seeds, hollow with one. Lines: the lowest "
                f"loss over the sizes tried at each budget, with {level} bands. Dashed: averaged over an image and its "
                "flop.",
                _draw_loss(fits),
                [*fits["cells"], *fits["profiles"]],
            )
            add(
                "isoflop",
                "isoFLOP profiles",
                "Loss by size at each budget, light to dark, with the parabola of log loss over log FLOPs. Diamonds: "
                "its minimum, where it lies between the sizes tried; without one the optimum is not bracketed.",
                _draw_profiles(fits),
                [row for row in fits["cells"] if not row["averaged"]],
            )
            add(
                "optimum",
                "optimal size and number of images",
                f"FLOPs of an image and images seen at the lowest loss of each budget, with {level} bands. Triangles: "
                "the smallest or the largest size is the best, so the optimum is at most or at least there. "
                "Squares: one size only. Bands end at the sizes tried.",
                _draw_optimum(fits),
                [row for row in fits["profiles"] if not row["averaged"]],
            )
        if len({row["unique_images"] for row in fits["data_cells"]}) > 1:
            add(
                "images",
                "loss against unique images",
                f"The same size and compute, with fewer images that repeat more often. Bands: {level}. Dashed: "
                "averaged over an image and its flop.",
                _draw_images(fits),
                fits["data_cells"],
            )
        if fits["data_gaps"] or fits["budget_gaps"]:
            add(
                "gap",
                "gap against epochs",
                f"Above: loss of {fits['study']['baseline']} minus that of {fits['study']['equivariant']}, with "
                f"{level} bands. Below: the share of this gap that others close, where it is above zero (the axis ends "
                f"at {percent(gap_figure.SHARES[0])} and {percent(gap_figure.SHARES[1])}). Left: fewer unique images "
                "at one budget. Right: all images and a larger budget.",
                gap_figure.draw(fits),
                gap_figure.rows(fits),
            )
        if rows := _multiplier_rows(fits):
            add(
                "multiplier",
                "compute multiplier",
                f"How many times the compute {fits['study']['baseline']} needs for the loss that the worse of the two "
                f"reaches at a budget, with {level} bands; dotted where a side is open. Above 1 the arm is better. "
                "Triangles: the loss is not reached, so the multiplier is at least or at most there.",
                _draw_multipliers(fits, rows),
                rows,
            )
    return drawn


def _draw_loss(fits: Fits) -> Figure:
    figure = Figure(figsize=(5.8, 4.8), layout="constrained")
    axes = figure.subplots()
    for row in fits["cells"]:
        if not row["averaged"]:
            _draw_cell(axes, fits, row, row["compute"], alpha=0.55)
    for found in group_by_series(fits["profiles"]).values():
        first, x = found[0], [row["compute"] for row in found]
        color = color_of(fits, first["arm"])
        draw_band(axes, x, [row["loss"] for row in found], color, alpha=0.07 if first["averaged"] else 0.16)
        axes.plot(
            x,
            [row["loss"]["value"] for row in found],
            color=color,
            linestyle=dashes_of(first),
            linewidth=1.7,
            gid=mark_gid(first["series"], f"{first['series']}: {found[-1]['loss']['value']:.4g} at the largest budget"),
        )
    log_axis(axes, "y", _LOSS)
    cost_axis(axes, [row["budget"] for row in fits["profiles"]], "compute of the training (FLOPs)")
    note_left_out(axes, fits)
    add_legend(figure, fits, fits["profiles"], _hollow(fits["cells"]))
    return figure


def _draw_cell(axes: Axes, fits: Fits, row: Row, x: float, color: str | None = None, alpha: float = 1.0) -> None:
    color = color or color_of(fits, row["arm"])
    if row["low"] is not None:
        axes.plot([x, x], [row["low"], row["high"]], color=color, linewidth=1, alpha=0.6 * alpha)
    seeds = f"{row['seeds']} seeds" if row["seeds"] > 1 else "one seed"
    text = f"{row['series']}, {row['size']}, {format_flops(row['budget'])}: {row['loss']:.4g} ({seeds})"
    axes.plot(
        x,
        row["loss"],
        "o",
        color=color,
        markersize=4,
        alpha=alpha,
        markerfacecolor=color if row["seeds"] > 1 else "white",
        gid=mark_gid(row["series"], text),
    )


def _draw_profiles(fits: Fits) -> Figure:
    panels = {name: rows for name, rows in group_by_series(fits["profiles"]).items() if not rows[0]["averaged"]}
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.2 + 2.1 * columns, 1.1 + 2.1 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    budgets = sorted({row["budget"] for row in fits["profiles"]})
    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.15, 0.95, len(budgets)))
    colors = {budget: to_hex(shade) for budget, shade in zip(budgets, shades, strict=True)}
    for axes, (name, profiles) in zip(grid.flat, panels.items(), strict=False):
        for row in fits["cells"]:
            if row["series"] == name:
                _draw_cell(axes, fits, row, row["flops_image"], color=colors[row["budget"]])
        for profile in profiles:
            _draw_parabola(axes, profile, colors[profile["budget"]])
        axes.set_title(name, fontsize=10, loc="left")
        note_left_out(axes, fits, profiles[0]["arm"])
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for number, axes in enumerate(grid.flat[: len(panels)]):
        is_left, is_lowest = number % columns == 0, number + columns >= len(panels)
        log_axis(axes, "y", _LOSS if is_left else "")
        flops_axis(axes, "FLOPs of an image" if is_lowest else "")
        axes.tick_params(labelbottom=is_lowest)
    handles = [Line2D([], [], color=color, marker="o", label=format_flops(b)) for b, color in colors.items()]
    handles += _hollow(fits["cells"])
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), fontsize=8.5)
    return figure


def _draw_parabola(axes: Axes, profile: Row, color: str) -> None:
    parabola = profile["parabola"]
    fitted = np.log(parabola["fitted_to"])
    x = np.linspace(fitted.min(), fitted.max(), 50)
    c0, c1, c2 = parabola["coefficients"]
    t = x - np.log(parabola["center"])
    axes.plot(np.exp(x), np.exp(c0 + t * (c1 + t * c2)), color=color, linewidth=1.2)
    if profile["bracketed"]:
        value, loss = profile["lowest_at"], profile["loss"]["value"]
        text = f"{profile['series']}, {format_flops(profile['budget'])}: lowest at {format_flops(value)} an image"
        axes.plot(
            value, loss, "D", color=color, markersize=6, markeredgecolor="white", gid=mark_gid(profile["series"], text)
        )


def _draw_optimum(fits: Fits) -> Figure:
    figure = Figure(figsize=(5.8, 6.2), layout="constrained")
    size_axes, image_axes = figure.subplots(2, 1, sharex=True)
    plain = [row for row in fits["profiles"] if not row["averaged"]]
    for name, found in group_by_series(plain).items():
        color = color_of(fits, found[0]["arm"])
        for axes, per_image in ((size_axes, True), (image_axes, False)):
            inside = [row for row in found if row["flops_image"] is not None]
            points = [_optimum(fits, row, per_image) for row in inside]
            x = [row["compute"] for row in inside]
            draw_band(axes, x, points, color)
            axes.plot(x, [point["value"] for point in points], "o-", color=color, linewidth=1.2, markersize=5)
            for row in found:
                if row not in inside:
                    _draw_open_optimum(axes, fits, row, per_image, color, name)
    for axes in (size_axes, image_axes):
        axes.margins(y=0.1)
    log_axis(size_axes, "y", "optimal FLOPs of an image")
    log_axis(image_axes, "y", "images seen at the optimum")
    for axes, label in ((size_axes, ""), (image_axes, "compute of the training (FLOPs)")):
        cost_axis(axes, [row["budget"] for row in plain], label)
    note_left_out(size_axes, fits)
    add_legend(figure, fits, plain, [_TRIANGLE] if any(row["flops_image"] is None for row in plain) else [])
    return figure


def _optimum(fits: Fits, row: Row, per_image: bool) -> dict[str, float]:
    """The optimal FLOPs of an image, whose open sides end at the sizes tried; or with C = 3 F D the images."""
    tried = _sizes_tried(fits, row)
    size = dict(row["flops_image"])
    size["low"], size["high"] = size["low"] or min(tried), size["high"] or max(tried)
    if per_image:
        return size
    third = row["compute"] / 3
    return {"value": third / size["value"], "low": third / size["high"], "high": third / size["low"]}


def _sizes_tried(fits: Fits, row: Row) -> list[float]:
    return [
        cell["flops_image"]
        for cell in fits["cells"]
        if (cell["series"], cell["budget"]) == (row["series"], row["budget"])
    ]


def _draw_open_optimum(axes: Axes, fits: Fits, row: Row, per_image: bool, color: str, name: str) -> None:
    sizes = _sizes_tried(fits, row)
    at_most = row["lowest_at"] <= np.sqrt(min(sizes) * max(sizes))
    value = row["lowest_at"] if per_image else row["compute"] / 3 / row["lowest_at"]
    marker = "s" if len(sizes) == 1 else "v" if at_most == per_image else "^"
    text = f"{name}, {format_flops(row['budget'])}: not bracketed"
    axes.plot(row["compute"], value, marker, color=color, markerfacecolor="white", gid=mark_gid(name, text))


def _draw_images(fits: Fits) -> Figure:
    figure = Figure(figsize=(5.8, 4.6), layout="constrained")
    axes = figure.subplots()
    for found in group_by_series(fits["data_cells"]).values():
        rows = sorted(found, key=lambda row: row["unique_images"])
        first, x = rows[0], [row["unique_images"] for row in rows]
        color = color_of(fits, first["arm"])
        if all(row["low"] is not None for row in rows):
            draw_series_band(axes, x, rows, first, color)
        axes.plot(x, [row["loss"] for row in rows], color=color, linestyle=dashes_of(first), linewidth=1.5)
        for row in rows if not first["averaged"] else ():
            _draw_cell(axes, fits, row, row["unique_images"])
    log_axis(axes, "y", _LOSS)
    cost_axis(axes, [row["unique_images"] for row in fits["data_cells"]], "unique training images", unit="images")
    note_left_out(axes, fits)
    add_legend(figure, fits, fits["data_cells"], _hollow(fits["data_cells"]))
    return figure


def _multiplier_rows(fits: Fits) -> list[dict[str, Any]]:
    arms = {row["series"]: (row["arm"], row["averaged"]) for row in fits["cells"]}
    return [
        {
            "series": series,
            "arm": arms[series][0],
            "averaged": arms[series][1],
            "budget": at["cost"],
            **{key: at[key] for key in ("value", "low", "high")},
        }
        for series, found in fits["compute_multipliers"].items()
        for at in found["costs"]
        if "value" in at
    ]


def _draw_multipliers(fits: Fits, rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(5.8, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="#888888", linewidth=1)
    for name, found in group_by_series(rows).items():
        first, color = found[0], color_of(fits, found[0]["arm"])
        known = [row for row in found if row["value"] is not None]
        x = [row["budget"] for row in known]
        text = f"{name}: " + ", ".join(format_number(row["value"]) for row in known)
        axes.plot(
            x,
            [row["value"] for row in known],
            color=color,
            marker="o",
            markersize=4,
            linestyle=dashes_of(first),
            linewidth=1.6,
            gid=mark_gid(name, text),
        )
        for row in found:
            if row["value"] is None and (ends := [bound for bound in bounds(row) if np.isfinite(bound)]):
                axes.plot(row["budget"], ends[0], "^" if row["high"] is None else "v", color=color)
    log_axis(axes, "y", f"compute of {fits['study']['baseline']} / compute of the arm")
    limits = axes.get_ylim()
    for found in group_by_series(rows).values():
        known = [row for row in found if row["value"] is not None]
        draw_series_band(axes, [row["budget"] for row in known], known, found[0], color_of(fits, found[0]["arm"]))
    closed = [bound for row in rows for bound in bounds(row) if np.isfinite(bound) and bound > 0]
    axes.set_ylim(min([limits[0], *closed]) / 1.05, max([limits[1], *closed]) * 1.05)
    log_axis(axes, "y", f"compute of {fits['study']['baseline']} / compute of the arm")
    cost_axis(axes, [row["budget"] for row in rows], "compute of the training (FLOPs)")
    note_left_out(axes, fits)
    add_legend(figure, fits, rows)
    return figure


def _hollow(cells: Any) -> list[Line2D]:
    return [_HOLLOW] if any(row["seeds"] == 1 for row in cells) else []


def _flat(rows: Any) -> list[dict[str, Any]]:
    """Returns rows without nested values: an estimate becomes its value and two columns for its bounds."""
    flat = []
    for row in rows:
        columns: dict[str, Any] = {}
        for key, value in row.items():
            if isinstance(value, Mapping) and "value" in value:
                columns |= {key: value["value"], f"{key}_low": value["low"], f"{key}_high": value["high"]}
            elif not isinstance(value, Mapping):
                columns[key] = value
        flat.append(columns)
    return flat
