"""Details of the report's figures."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from pipeline.reporting.figures import _end_at_100


@pytest.mark.parametrize("top1", [[97.0, 97.0], [99.5, 98.0], [100.0, 100.0]])
def test_a_percent_axis_ends_at_100(top1):
    axes = Figure().subplots()
    axes.plot([1, 2], top1)
    axes.margins(y=0.5)
    assert axes.get_ylim()[1] > 100
    _end_at_100(axes)
    low, high = axes.get_ylim()
    assert low < min(top1) and high == 100
