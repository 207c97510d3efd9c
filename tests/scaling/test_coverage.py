"""The 90 % intervals hold the truth about as often as they say."""

from __future__ import annotations

import pytest

from tests.scaling.coverage import PLAN, simulate


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say():
    shares = simulate(PLAN, 200)
    assert shares.pop("identified") > 0.95
    for name, share in shares.items():
        assert 0.80 <= share <= 0.97, (name, share)
