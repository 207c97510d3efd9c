"""Details of the report's figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from pipeline.reporting import figures
from tests.reporting.conftest import load_results, write_fake_study


@pytest.mark.parametrize("top1", [[97.0, 97.0], [99.5, 98.0], [100.0, 100.0]])
def test_a_percent_axis_ends_at_100(top1):
    axes = Figure().subplots()
    axes.plot([1, 2], top1)
    axes.margins(y=0.5)
    assert axes.get_ylim()[1] > 100
    figures._end_at_100(axes)
    low, high = axes.get_ylim()
    assert low < min(top1) and high == 100


@pytest.mark.parametrize("spread", [0.0, 0.2, 5.0])
def test_labels_stay_clear_of_each_other(tmp_path: Path, spread: float) -> None:
    results = list(load_results(tmp_path, write_fake_study(tmp_path)).values())
    places = {result.run: 90 + spread * number for number, result in enumerate(results)}
    figure = figures.scatter(results, lambda r: (r.flops or 0) / 1e6, lambda r: places[r.run], "x", "y")
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == len(results)
    assert not any(a.overlaps(b) for number, a in enumerate(boxes) for b in boxes[:number])
