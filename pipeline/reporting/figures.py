"""The report's figures. Colors are families, markers and dashes are variants; hollow markers did not converge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product, zip_longest
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullFormatter

from pipeline.base.plotting import MATPLOTLIB_STYLE, RenderedFigure, mark_gid, render_figure
from pipeline.reporting.run_results import RunResult, SeedSpread, group_by_seed, seed_spread

# Okabe and Ito's palette, distinguishable with every common color blindness.
COLORS = {"vit": "#0072B2", "resmlp": "#D55E00", "convnext_iso": "#009E73", None: "#666666"}

FAMILIES = {"vit": "ViT", "resmlp": "ResMLP", "convnext_iso": "ConvNeXt (iso.)", None: "other"}

MARKERS = {"X": "o", "E": "^", "H": "s", None: "D"}

DASHES = {"X": "-", "E": (0, (4, 1.5)), "H": (0, (1, 1.2)), None: "-."}

VARIANTS = {"X": "X, baseline", "E": "E(X), equivariant", "H": "H(X), hybrid", None: "other"}

Point = tuple[float, float]

Box = tuple[float, float, float, float]

_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))


def draw_figures(
    results: Sequence[RunResult], flops: tuple[float, str], params: tuple[float, str]
) -> list[RenderedFigure]:
    """Draws all figures of a study. The seeds of one run form one point with their range, or one line with a band.

    Args:
        flops, params: divisor and unit of their axes, such as (1e9, "GFLOPs").
    """
    per_flop, flop_unit = flops
    per_param, param_unit = params
    base = {result.run: result for result in results}

    def gflops(result: RunResult) -> float | None:
        return result.flops and result.flops / per_flop

    def gparams(result: RunResult) -> float | None:
        return result.params and result.params / per_param

    def baseline_gflops(result: RunResult) -> float | None:
        return gflops(base[result.baseline]) if result.baseline else None

    def gain_pct(result: RunResult) -> float | None:
        return result.throughput_ratio and 100 * (result.throughput_ratio - 1)

    edge = _clip_diverged(results)
    with matplotlib.rc_context(MATPLOTLIB_STYLE):
        return [
            render_figure(
                "accuracy_vs_flops",
                "Accuracy against FLOPs",
                "Validation top-1 by the FLOPs of a forward pass (the paper's figure 1). Thin lines join "
                "E(X) and H(X) to their X. Hollow: did not converge; drawn at the edge if far below the rest."
                + " Bars: lowest to highest of several seeds."
                * (len(group_by_seed(results)) < len(results)),
                scatter(
                    results,
                    gflops,
                    edge,
                    f"{flop_unit} per image",
                    "validation top-1 (%)",
                    label=lambda r: r.label if edge(r) == r.top1_pct else f"{r.label} at {r.top1_pct:.0f}%",
                    join=True,
                    percent=True,
                ),
                _rows(results, "complexity/gflops", "val/top1_pct"),
            ),
            render_figure(
                "flops_vs_params",
                "FLOPs against parameters",
                "Points on one line through the origin have the same FLOPs per parameter (the paper's figure 5).",
                scatter(
                    results,
                    gparams,
                    gflops,
                    f"parameters ({param_unit})",
                    f"{flop_unit} per image",
                    proportional=True,
                ),
                _rows(results, "complexity/params_m", "complexity/gflops"),
            ),
            render_figure(
                "throughput_gain",
                "Throughput gain against FLOPs",
                "Forward throughput of E(X) and H(X) relative to their X, by the FLOPs of X "
                "(the paper's figure 6). Below 0 they are slower than X.",
                scatter(
                    results,
                    baseline_gflops,
                    gain_pct,
                    f"{flop_unit} per image, of X",
                    "throughput gain over X (%)",
                    zero=True,
                ),
                _rows(results, "complexity/gflops", "complexity/flop_ratio", "perf/throughput_ratio"),
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


def _rows(results: Sequence[RunResult], *numbers: str) -> list[dict[str, Any]]:
    """Returns one row per run, with metrics under their names in metrics.json."""
    known = ("run", "group", "seed", "model", "family", "variant", "converged")
    return [
        {key: getattr(r, key) for key in known} | {name: r.all_metrics().get(name) for name in numbers} for r in results
    ]


def _clip_diverged(results: Sequence[RunResult]) -> Callable[[RunResult], float | None]:
    """Returns top-1 as a function, clipped for diverged runs so that the converged runs stay distinguishable."""
    converged = [r.top1_pct for r in results if r.converged and r.top1_pct is not None]
    edge = min(converged) - max(1.0, 0.4 * (max(converged) - min(converged))) if converged else 0.0
    return lambda r: r.top1_pct if r.top1_pct is None or r.converged else max(r.top1_pct, edge)


def scatter(
    results: Sequence[RunResult],
    x: Callable[[RunResult], float | None],
    y: Callable[[RunResult], float | None],
    xlabel: str,
    ylabel: str,
    *,
    label: Callable[[RunResult], str] = lambda result: result.label,
    join: bool = False,
    proportional: bool = False,
    zero: bool = False,
    percent: bool = False,
) -> Figure:
    """Draws a point for each run, or for all seeds of a run, with a bar from their lowest to their highest value.

    Args:
        label: text beside each point.
        join: draw a line from each E and H to its X.
        proportional: show the origin, or make both axes logarithmic.
        zero: draw the line y = 0.
        percent: end the y axis at 100.
    """
    figure = Figure(figsize=(5.4, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    drawn, positions = [], {}
    for members in group_by_seed(results):
        x_spread, y_spread = seed_spread(members, x), seed_spread(members, y)
        if x_spread is not None and y_spread is not None:
            drawn.append((members, y_spread))
            positions |= {member.run: (x_spread.mean, y_spread.mean) for member in members}
    if not drawn:
        return _empty_figure(figure, axes)
    if zero:
        axes.axhline(0, color="#999999", linewidth=1)
    lines = []
    for (result, *_), y_spread in drawn:
        color = COLORS[result.family]
        if join and result.baseline in positions:
            lines.append((positions[result.baseline], positions[result.run]))
            axes.plot(*zip(*lines[-1], strict=True), color=color, linewidth=1, alpha=0.4, zorder=1)
        if y_spread.low < y_spread.high:
            at = positions[result.run][0]
            axes.plot([at, at], [y_spread.low, y_spread.high], color=color, linewidth=1.5, marker="_", zorder=2)
            lines.append(((at, y_spread.low), (at, y_spread.high)))
    for members, y_spread in drawn:
        result, position = members[0], positions[members[0].run]
        color = COLORS[result.family]
        face = color if any(member.converged for member in members) else "white"
        seeds = f" ({y_spread.low:.4g} to {y_spread.high:.4g}, {y_spread.n} seeds)" if y_spread.n > 1 else ""
        tooltip = f"{label(result)}: {xlabel} {position[0]:.4g}; {ylabel} {position[1]:.4g}{seeds}"
        axes.plot(
            *position,
            MARKERS[result.variant],
            color=color,
            markerfacecolor=face,
            markersize=8,
            zorder=3,
            gid=mark_gid(result.group, tooltip),
        )
    _set_scales(axes, list(positions.values()), proportional)
    if percent:
        _end_at_100(axes)
    shown = [members[0] for members, _ in drawn]
    _add_legend(figure, shown)
    _place_labels(figure, axes, [(label(r), positions[r.run], COLORS[r.family]) for r in shown], lines)
    return figure


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
        return _empty_figure(figure, top1)
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


def _empty_figure(figure: Figure, axes: Axes) -> Figure:
    where = {"ha": "center", "va": "center", "transform": axes.transAxes}
    axes.text(0.5, 0.5, "nothing measured", color="#777777", **where)
    axes.set(xticks=[], yticks=[])
    return figure


def _set_scales(axes: Axes, positions: Sequence[Point], proportional: bool) -> None:
    """Sets logarithmic axes if x spans more than a decade, and leaves room for labels at the edges."""
    xs = [x for x, _ in positions]
    axes.margins(x=0.14, y=0.12)
    if min(xs) > 0 and max(xs) > 10 * min(xs):
        axes.set(xscale="log", yscale="log" if proportional else "linear")
        for axis in (axes.xaxis, axes.yaxis) if proportional else (axes.xaxis,):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
    elif proportional:
        axes.set(xlim=(0, max(xs) * 1.14), ylim=(0, None))


def _end_at_100(axes: Axes) -> None:
    """Ends a y axis of percentages at 100. Matplotlib exceeds it if all values are equal or close to 100."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, 100))


def _add_legend(figure: Figure, results: Sequence[RunResult]) -> None:
    """Adds a legend with families in the first row and variants in the second."""
    families = [family for family in COLORS if any(r.family == family for r in results)]
    variants = [variant for variant in MARKERS if any(r.variant == variant for r in results)]
    first = [Line2D([], [], color=COLORS[family], lw=5, label=FAMILIES[family]) for family in families]
    second = [
        Line2D([], [], color="#444444", marker=MARKERS[variant], ls="", label=VARIANTS[variant]) for variant in variants
    ]
    blank = Line2D([], [], ls="", label=" ")
    pairs = zip_longest(first, second, fillvalue=blank)  # a legend is filled column by column
    figure.legend(
        handles=[handle for pair in pairs for handle in pair],
        loc="outside lower center",
        ncols=max(len(first), len(second)),
        fontsize=8.5,
        handlelength=1.2,
        columnspacing=1.2,
    )


def _place_labels(
    figure: Figure,
    axes: Axes,
    labels: Sequence[tuple[str, Point, str]],
    lines: Sequence[tuple[Point, Point]],
) -> None:
    """Writes each label at the nearest position around its point that is clear of points, labels and lines."""
    figure.draw_without_rendering()
    pixel = figure.dpi / 72
    pixel_positions = [axes.transData.transform(position) for _, position, _ in labels]
    occupied = [_box(x, y, 12 * pixel, 12 * pixel) for x, y in pixel_positions]
    for a, b in lines:
        (ax, ay), (bx, by) = axes.transData.transform([a, b])
        occupied += [_box(ax + (bx - ax) * t / 40, ay + (by - ay) * t / 40, 2, 2) for t in range(41)]
    left, bottom, right, top = axes.bbox.extents
    for (text, position, color), (x, y) in zip(labels, pixel_positions, strict=True):
        note = axes.annotate(
            text,
            position,
            (0, 0),
            textcoords="offset points",
            color=color,
            fontsize=9,
            ha="center",
            va="center",
        )
        note.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        extent = note.get_window_extent()
        candidates = []
        for distance, (dx, dy) in product((9, 16, 26, 38, 52), _DIRECTIONS):
            shift = (dx * (distance * pixel + extent.width / 2), dy * distance * 1.2 * pixel)
            box = _box(x + shift[0], y + shift[1], extent.width, extent.height)
            outside = box[0] < left or box[1] < bottom or box[2] > right or box[3] > top
            candidates.append((sum(_overlap(box, other) for other in occupied) + 10 * outside, shift, box))
            if not candidates[-1][0]:
                break
        _, shift, box = min(candidates, key=lambda candidate: candidate[0])
        note.set_position((shift[0] / pixel, shift[1] / pixel))
        occupied.append(box)


def _box(x: float, y: float, width: float, height: float) -> Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
