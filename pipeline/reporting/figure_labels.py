"""Places the labels of points in a figure where they cover nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

Point = tuple[float, float]

Box = tuple[float, float, float, float]

_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))


def place_labels(
    figure: Figure,
    axes: Axes,
    labels: Sequence[tuple[str, Point, str]],
    points: Sequence[Point],
    lines: Sequence[tuple[Point, Point]],
) -> None:
    """Writes each label at the nearest position around its point that is clear of points, labels and lines.

    Call it when the axes have their final limits.

    Args:
        labels: text, point in data coordinates, and color.
        points: all points, also those without a label.
    """
    figure.draw_without_rendering()
    pixel = figure.dpi / 72
    occupied = [_box(x, y, 12 * pixel, 12 * pixel) for x, y in axes.transData.transform(points)]
    for a, b in lines:
        (ax, ay), (bx, by) = axes.transData.transform([a, b])
        occupied += [_box(ax + (bx - ax) * t / 40, ay + (by - ay) * t / 40, 2, 2) for t in range(41)]
    left, bottom, right, top = axes.bbox.extents
    for text, position, color in labels:
        x, y = axes.transData.transform(position)
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
