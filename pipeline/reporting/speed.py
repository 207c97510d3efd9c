"""Quartiles of measured times, and throughput ratios of models that alternated pass by pass."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flopeq.measure.throughput import quartiles

_CONDITIONS = ("device", "dtype", "batch_size", "compiled")


class Quartiles(NamedTuple):
    """Median of several measurements, between their first and third quartile."""

    first: float
    median: float
    third: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.first:.2f} to {self.third:.2f})"


def quartiles_of(values: Sequence[float]) -> Quartiles | None:
    """Returns the quartiles of the values; None if there are none."""
    if not values:
        return None
    first, third = quartiles(tuple(values))
    return Quartiles(first, statistics.median(values), third)


def with_quartiles(name: str, found: Quartiles | None) -> dict[str, float]:
    """Returns the median as metric `name`, and the quartiles as `<name>_q1` and `<name>_q3`; nothing for None."""
    return {} if found is None else {name: found.median, f"{name}_q1": found.first, f"{name}_q3": found.third}


def ratios_of_passes(entry: Mapping[str, Any], baseline: Mapping[str, Any]) -> tuple[float, ...]:
    """Returns the throughput of a run over that of its baseline for each pair of neighbouring passes.

    The arguments are entries of throughput.json. Returns () if one of them is empty, if they were not measured under
    the same conditions, or if they did not alternate because they do not fit the device's memory together.
    """
    if not entry or not baseline or any(entry[key] != baseline[key] for key in _CONDITIONS):
        return ()
    if not (entry.get("alternated", True) and baseline.get("alternated", True)):
        return ()
    return tuple(slow / fast for fast, slow in zip(entry["pass_s"], baseline["pass_s"], strict=True))
