"""What the report's figures draw, and where."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.reporting.run_results import RunResult
from pipeline.reporting.scatter import Estimate, Mark, Scatter, draw_panels
from tests.reporting.conftest import load_results, write_fake_study


@pytest.fixture
def results(tmp_path: Path) -> list[RunResult]:
    return list(load_results(tmp_path, write_fake_study(tmp_path)).values())


def exact(value: float) -> Estimate:
    return Estimate(value, value, value)


def mark(result: RunResult, x: float, y: float | Estimate, label: str = "") -> Mark:
    return Mark([result], exact(x), y if isinstance(y, Estimate) else exact(y), label)


def lines_of(axes: Axes) -> list[tuple[Sequence[float], Sequence[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]  # pyright: ignore[reportArgumentType]


def drawn_axes(drawn: Scatter) -> Axes:
    return draw_panels(drawn).axes[0]


@pytest.mark.parametrize("top1", [[97.0, 97.0], [99.9, 98.0], [100.0, 100.0]])
def test_a_percent_axis_ends_at_100(results, top1):
    marks = [mark(result, x, y) for result, x, y in zip(results, (1, 2), top1, strict=False)]
    assert drawn_axes(Scatter(marks, "x", "y")).get_ylim()[1] > 100
    low, high = drawn_axes(Scatter(marks, "x", "y", percent=True)).get_ylim()
    assert low < min(top1) and high == 100


@pytest.mark.parametrize("spread", [0.0, 0.2, 5.0])
def test_labels_stay_clear_of_each_other(results, spread: float) -> None:
    marks = [
        mark(result, (result.flops or 0) / 1e6, 90 + spread * number, result.run)
        for number, result in enumerate(results)
    ]
    figure = draw_panels(Scatter(marks, "x", "y"))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == len(results)
    assert not any(a.overlaps(b) for number, a in enumerate(boxes) for b in boxes[:number])


def test_x_is_joined_to_its_e_and_more_lightly_to_its_h(results):
    places = {"vit": (2.0, 90.0), "e-vit": (1.0, 80.0), "h-vit": (1.5, 85.0)}
    by_run = {result.run: result for result in results}
    axes = drawn_axes(Scatter([mark(by_run[run], *at) for run, at in places.items()], "x", "y", join=True))
    joined = {
        (tuple(xs), tuple(ys)): line.get_linewidth() * (line.get_alpha() or 1)
        for line, (xs, ys) in zip(axes.lines, lines_of(axes), strict=True)
        if len(xs) == 2
    }
    to_e, to_h = joined[(2.0, 1.0), (90.0, 80.0)], joined[(2.0, 1.5), (90.0, 85.0)]
    assert len(joined) == 2 and to_e > to_h


def test_intervals_of_both_axes_are_bars(results):
    found = Mark([results[0]], Estimate(5, 4, 7), Estimate(90, 85, 92))
    upright, level, point = ([5, 5], [85, 92]), ([4, 7], [90, 90]), ([5], [90])
    assert lines_of(drawn_axes(Scatter([found], "x", "y"))) == [upright, level, point]
    assert lines_of(drawn_axes(Scatter([mark(results[0], 5, 90)], "x", "y"))) == [point]


def test_points_of_equal_and_nearly_equal_cost_stay_where_they_belong(results):
    xs = [2.0, 2.0, 2.01, 1.99, 1.0]
    marks = [mark(result, x, Estimate(90, 80, 95)) for result, x in zip(results, xs, strict=False)]
    axes = drawn_axes(Scatter(marks, "x", "y", from_zero=True))
    assert [x[0] for x, _ in lines_of(axes) if len(x) == 1] == xs


def test_an_axis_of_more_than_a_decade_is_logarithmic(results):
    wide = [mark(result, x, 90 + x) for result, x in zip(results, (1, 20), strict=False)]
    assert drawn_axes(Scatter(wide, "x", "y", from_zero=True)).get_xscale() == "log"
    assert drawn_axes(Scatter(wide[:1], "x", "y", from_zero=True)).get_xlim()[0] == 0


def test_a_figure_without_runs_says_so():
    figure = draw_panels(Scatter([], "x", "y"))
    assert isinstance(figure, Figure) and [text.get_text() for text in figure.axes[0].texts] == ["nothing measured"]
