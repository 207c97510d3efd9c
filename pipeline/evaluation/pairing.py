"""Comparison of two networks over the same validation images. Each may stand for several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation import statistics
from pipeline.evaluation.predictions import ImageHits
from pipeline.evaluation.statistics import Interval, Verdict


class PairingError(ValueError):
    """Two runs were evaluated on different images. The message names them and says what to do."""


@dataclass(frozen=True)
class Comparison:
    """The top-1 of a network minus that of its baseline, in percentage points."""

    label: str
    """The run, or the first of its seeds."""
    baseline_label: str
    difference_pct: float
    interval: Interval
    """95 % interval of the difference, in percentage points."""
    mcnemar_p: float | None
    """McNemar's exact test of equal accuracy; None if either side has several seeds."""
    num_seeds: int
    num_baseline_seeds: int

    @property
    def verdict(self) -> Verdict:
        """Whether the network is better than its baseline, by the interval."""
        return statistics.judge(self.interval)


def compare(
    label: str, seeds: Sequence[ImageHits], baseline_label: str, baseline_seeds: Sequence[ImageHits]
) -> Comparison:
    """Compares the hits of one or more seeds of a network with those of its baseline.

    Raises: PairingError if they are of different images.
    """
    if len({each.images for each in (*seeds, *baseline_seeds)}) > 1:
        raise PairingError(
            f"{label} and {baseline_label} were not evaluated on the same validation images, so they cannot be "
            f"compared image by image: `dvc repro` evaluates them again"
        )
    hits, baseline_hits = (np.stack([each.hits for each in side]) for side in (seeds, baseline_seeds))
    single = len(seeds) == len(baseline_seeds) == 1
    return Comparison(
        label,
        baseline_label,
        difference_pct=100 * float(hits.mean() - baseline_hits.mean()),
        interval=statistics.paired_difference(hits, baseline_hits).scaled(100),
        mcnemar_p=statistics.mcnemar_exact(hits[0], baseline_hits[0]) if single else None,
        num_seeds=len(seeds),
        num_baseline_seeds=len(baseline_seeds),
    )
