"""What is worth having: the Pareto front, and whether a difference is more than the spread over seeds."""

from __future__ import annotations

from collections.abc import Sequence


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of the points (cost, value) no other is better than: cheaper, worth more, or both.

    Of points that are equal in both, each is on the front.
    """
    return [
        number for number, (cost, value) in enumerate(points)
        if not any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points)
    ]


def beyond_spread(better: Sequence[float], worse: Sequence[float]) -> bool:
    """Whether every one of the first values is above every one of the others: their ranges do not meet.

    Between n and n values that are drawn alike, chance alone brings this about once in (2n choose n) times: 6 for two
    a side, 20 for three. A single value has no spread.
    """
    return len(better) > 1 and len(worse) > 1 and min(better) > max(worse)
