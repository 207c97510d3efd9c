"""The report's figures. A colour is a family, a marker or dash a variant; hollow markers did not converge."""

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

from pipeline.pictures import STYLE, Picture, mark, picture
from pipeline.report import Result, Spread, grouped, spread

# Okabe and Ito's palette, told apart under every common colour blindness.
COLOURS = {"vit": "#0072B2", "resmlp": "#D55E00", "convnext_iso": "#009E73", None: "#666666"}
FAMILIES = {"vit": "ViT", "resmlp": "ResMLP", "convnext_iso": "ConvNeXt (iso.)", None: "other"}
MARKERS = {"X": "o", "E": "^", "H": "s", None: "D"}
DASHES = {"X": "-", "E": (0, (4, 1.5)), "H": (0, (1, 1.2)), None: "-."}
VARIANTS = {"X": "X, baseline", "E": "E(X), equivariant", "H": "H(X), hybrid", None: "other"}

Place = tuple[float, float]
Box = tuple[float, float, float, float]

_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))


def draw(results: Sequence[Result], flops: tuple[float, str], params: tuple[float, str]) -> list[Picture]:
    """All figures of a study. Seeds of one run are one point with their range, or one line with a band.

    Args:
        flops, params: divisor and unit of their axes, such as (1e9, "GFLOPs").
    """
    per_flop, flop_unit = flops
    per_param, param_unit = params
    base = {result.run: result for result in results}

    def gflops(result: Result) -> float | None:
        return result.flops and result.flops / per_flop

    def gparams(result: Result) -> float | None:
        return result.params and result.params / per_param

    def baseline_gflops(result: Result) -> float | None:
        return gflops(base[result.baseline]) if result.baseline else None

    def gain_pct(result: Result) -> float | None:
        return result.throughput_ratio and 100 * (result.throughput_ratio - 1)

    edge = _above_edge(results)
    with matplotlib.rc_context(STYLE):
        return [
            picture(
                "accuracy_vs_flops",
                "Accuracy against FLOPs",
                "Validation top-1 by the FLOPs of a forward pass (the paper's figure 1). Thin lines join "
                "E(X) and H(X) to their X. Hollow: did not converge; far below the rest, at the edge."
                + " Bars: from the lowest to the highest of several seeds." * (len(grouped(results)) < len(results)),
                scatter(
                    results,
                    gflops,
                    edge,
                    f"{flop_unit} per image",
                    "validation top-1 (%)",
                    label=lambda r: r.label if edge(r) == r.top1_pct else f"{r.label} at {r.top1_pct:.0f}%",
                    join=True,
                ),
                _rows(results, "complexity/gflops", "val/top1_pct"),
            ),
            picture(
                "flops_vs_params",
                "FLOPs against parameters",
                "On one line through the origin, the work per parameter is the same (the paper's figure 5).",
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
            picture(
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
            picture(
                "training_curves",
                "Training curves",
                "Validation top-1 and training loss after each epoch."
                + " Bands: from the lowest to the highest of several seeds." * (len(grouped(results)) < len(results)),
                _curves(results),
                [{"run": r.run, "group": r.group, "seed": r.seed, "epoch": int(row["epoch"]) + 1,
                  "val/top1_pct": row["val/top1_pct"], "train/loss": row["train/loss"]}
                 for r in results for row in r.history],
            ),
        ]


def _rows(results: Sequence[Result], *numbers: str) -> list[dict[str, Any]]:
    """A row for each run, with numbers under their names in metrics.json."""
    known = ("run", "group", "seed", "model", "family", "variant", "converged")
    return [{key: getattr(r, key) for key in known} | {name: r.numbers().get(name) for name in numbers}
            for r in results]


def _above_edge(results: Sequence[Result]) -> Callable[[Result], float | None]:
    """Top-1, but not so far below the runs that converged that these fall into one heap."""
    good = [r.top1_pct for r in results if r.converged and r.top1_pct is not None]
    edge = min(good) - max(1.0, 0.4 * (max(good) - min(good))) if good else 0.0
    return lambda r: r.top1_pct if r.top1_pct is None or r.converged else max(r.top1_pct, edge)


def scatter(
    results: Sequence[Result],
    x: Callable[[Result], float | None],
    y: Callable[[Result], float | None],
    xlabel: str,
    ylabel: str,
    *,
    label: Callable[[Result], str] = lambda result: result.label,
    join: bool = False,
    proportional: bool = False,
    zero: bool = False,
) -> Figure:
    """A point for each run, or for all seeds of one, with a bar from their lowest to their highest.

    Args:
        label: what is written beside it.
        join: draw a line from each E and H to its X.
        proportional: show the origin, or make both axes logarithmic.
        zero: draw the line y = 0.
    """
    figure = Figure(figsize=(5.4, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    drawn, places = [], {}
    for members in grouped(results):
        across, along = spread(members, x), spread(members, y)
        if across is not None and along is not None:
            drawn.append((members, along))
            places |= {member.run: (across.mean, along.mean) for member in members}
    if not drawn:
        return _nothing(figure, axes)
    if zero:
        axes.axhline(0, color="#999999", linewidth=1)
    lines = []
    for (result, *_), along in drawn:
        colour = COLOURS[result.family]
        if join and result.baseline in places:
            lines.append((places[result.baseline], places[result.run]))
            axes.plot(*zip(*lines[-1], strict=True), color=colour, linewidth=1, alpha=0.4, zorder=1)
        if along.low < along.high:
            at = places[result.run][0]
            axes.plot([at, at], [along.low, along.high], color=colour, linewidth=1.5, marker="_", zorder=2)
            lines.append(((at, along.low), (at, along.high)))
    for members, along in drawn:
        result, place = members[0], places[members[0].run]
        colour = COLOURS[result.family]
        face = colour if any(member.converged for member in members) else "white"
        seeds = f" ({along.low:.4g} to {along.high:.4g}, {along.n} seeds)" if along.n > 1 else ""
        words = f"{label(result)}: {xlabel} {place[0]:.4g}; {ylabel} {place[1]:.4g}{seeds}"
        axes.plot(*place, MARKERS[result.variant], color=colour, markerfacecolor=face, markersize=8, zorder=3,
                  gid=mark(result.group, words))
    _scale(axes, list(places.values()), proportional)
    shown = [members[0] for members, _ in drawn]
    _key(figure, shown)
    _label(figure, axes, [(label(r), places[r.run], COLOURS[r.family]) for r in shown], lines)
    return figure


def _curves(results: Sequence[Result]) -> Figure:
    figure = Figure(figsize=(5.4, 6.6), layout="constrained")
    top1, loss = figure.subplots(2, 1, sharex=True)
    drawn = [known for members in grouped(results) if (known := [r for r in members if r.history])]
    for axes, column in ((top1, "val/top1_pct"), (loss, "train/loss")):
        for members in drawn:
            result, curve = members[0], [_spread_at(members, column, epoch) for epoch in range(_epochs(members))]
            colour, epochs = COLOURS[result.family], range(1, len(curve) + 1)
            if len(members) > 1:
                axes.fill_between(epochs, [at.low for at in curve], [at.high for at in curve], color=colour, alpha=0.15,
                                  linewidth=0)
            words = f"{result.label}: {curve[-1].mean:.4g} after {len(curve)} epochs, best {_best(curve, column):.4g}"
            axes.plot(
                epochs,
                [at.mean for at in curve],
                color=colour,
                linestyle=DASHES[result.variant],
                linewidth=1.7,
                gid=mark(result.group, words),
            )
    top1.set(ylabel="validation top-1 (%)")
    loss.set(xlabel="epoch", ylabel="training loss")
    if not drawn:
        return _nothing(figure, top1)
    handles = [
        Line2D([], [], color=COLOURS[r.family], linestyle=DASHES[r.variant], linewidth=1.7, label=r.label)
        for r, *_ in drawn
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8.5, handlelength=2.6)
    return figure


def _epochs(members: Sequence[Result]) -> int:
    """How many epochs all of them have."""
    return min(len(member.history) for member in members)


def _spread_at(members: Sequence[Result], column: str, epoch: int) -> Spread:
    """Of a column of history.csv, over the members."""
    values = [member.history[epoch][column] for member in members]
    return Spread(sum(values) / len(values), min(values), max(values), len(values))


def _best(curve: Sequence[Spread], column: str) -> float:
    best = min if column.endswith("loss") else max
    return best(at.mean for at in curve)


def _nothing(figure: Figure, axes: Axes) -> Figure:
    where = {"ha": "center", "va": "center", "transform": axes.transAxes}
    axes.text(0.5, 0.5, "nothing measured", color="#777777", **where)
    axes.set(xticks=[], yticks=[])
    return figure


def _scale(axes: Axes, places: Sequence[Place], proportional: bool) -> None:
    """Logarithmic where x spans more than a decade, and room for labels at the edges."""
    xs = [x for x, _ in places]
    axes.margins(x=0.14, y=0.12)
    if min(xs) > 0 and max(xs) > 10 * min(xs):
        axes.set(xscale="log", yscale="log" if proportional else "linear")
        for axis in (axes.xaxis, axes.yaxis) if proportional else (axes.xaxis,):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
    elif proportional:
        axes.set(xlim=(0, max(xs) * 1.14), ylim=(0, None))


def _key(figure: Figure, results: Sequence[Result]) -> None:
    """Families in a first row, variants in a second."""
    families = [family for family in COLOURS if any(r.family == family for r in results)]
    variants = [variant for variant in MARKERS if any(r.variant == variant for r in results)]
    first = [Line2D([], [], color=COLOURS[family], lw=5, label=FAMILIES[family]) for family in families]
    second = [
        Line2D([], [], color="#444444", marker=MARKERS[variant], ls="", label=VARIANTS[variant])
        for variant in variants
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


def _label(
    figure: Figure,
    axes: Axes,
    labels: Sequence[tuple[str, Place, str]],
    lines: Sequence[tuple[Place, Place]],
) -> None:
    """Writes each label at the nearest place around its point that is clear of points, labels and lines."""
    figure.draw_without_rendering()
    pixel = figure.dpi / 72
    spots = [axes.transData.transform(place) for _, place, _ in labels]
    taken = [_box(x, y, 12 * pixel, 12 * pixel) for x, y in spots]
    for a, b in lines:
        (ax, ay), (bx, by) = axes.transData.transform([a, b])
        taken += [_box(ax + (bx - ax) * t / 40, ay + (by - ay) * t / 40, 2, 2) for t in range(41)]
    left, bottom, right, top = axes.bbox.extents
    for (text, place, colour), (x, y) in zip(labels, spots, strict=True):
        note = axes.annotate(
            text,
            place,
            (0, 0),
            textcoords="offset points",
            color=colour,
            fontsize=9,
            ha="center",
            va="center",
        )
        note.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        extent = note.get_window_extent()
        fits = []
        for distance, (dx, dy) in product((9, 16, 26, 38, 52), _DIRECTIONS):
            shift = (dx * (distance * pixel + extent.width / 2), dy * distance * 1.2 * pixel)
            box = _box(x + shift[0], y + shift[1], extent.width, extent.height)
            outside = box[0] < left or box[1] < bottom or box[2] > right or box[3] > top
            fits.append((sum(_overlap(box, other) for other in taken) + 10 * outside, shift, box))
            if not fits[-1][0]:
                break
        _, shift, box = min(fits, key=lambda fit: fit[0])
        note.set_position((shift[0] / pixel, shift[1] / pixel))
        taken.append(box)


def _box(x: float, y: float, width: float, height: float) -> Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
