"""How often the 95 % intervals of pipeline.evaluation.statistics hold the true value, in simulation.

    python -m tests.evaluation.coverage [repetitions]      # the figures in docs/measuring.md

Whether seed s of network m is right about image i is the sign of a normal variable, the sum of what all networks make
of the image, what network m makes of it, what the seed is worth, and what this seed makes of this image. So the true
accuracy over all images and seeds is known.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from pipeline.evaluation import statistics

NETWORK_SD, SEED_IMAGE_SD = 0.6, 1.0
"""Standard deviations of network m's and of seed s's view of an image, where that of all networks has 1."""


class Coverage(NamedTuple):
    """Shares of the repetitions in which the interval holds the true value."""

    mean: float
    """For the accuracy of a network."""
    difference: float
    """For the difference between two."""


def simulate(num_seeds: int, num_images: int, seed_sd_pct: float, repetitions: int) -> Coverage:
    """Simulates two networks of 90 and 91 % accuracy.

    Args:
        seed_sd_pct: standard deviation of the accuracy over seeds, in percentage points.
    """
    rng = np.random.default_rng(0)
    image_sd = np.sqrt(1 + NETWORK_SD**2 + SEED_IMAGE_SD**2)
    seed_sd = seed_sd_pct / 100 / norm.pdf(norm.ppf(0.9)) * image_sd
    scale = np.sqrt(image_sd**2 + seed_sd**2)
    accuracy, baseline_accuracy = 0.91, 0.90
    held = np.zeros(2)
    for _ in range(repetitions):
        easiness = rng.standard_normal(num_images)
        hits, baseline_hits = (
            _draw_hits(easiness + scale * norm.ppf(truth), num_seeds, seed_sd, rng)
            for truth in (accuracy, baseline_accuracy)
        )
        if num_seeds == 1:
            mean = statistics.wilson_interval(int(hits.sum()), hits.size)
        else:
            mean = statistics.bootstrap_interval(hits)
        difference = statistics.paired_difference(hits, baseline_hits)
        held += [mean.low <= accuracy <= mean.high, difference.low <= accuracy - baseline_accuracy <= difference.high]
    return Coverage(*(held / repetitions))


def _draw_hits(
    easiness: NDArray[np.float64], num_seeds: int, seed_sd: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    network = NETWORK_SD * rng.standard_normal(len(easiness))
    seeds = seed_sd * rng.standard_normal((num_seeds, 1))
    return easiness + network + seeds + SEED_IMAGE_SD * rng.standard_normal((num_seeds, len(easiness))) > 0


if __name__ == "__main__":
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    statistics.NUM_DRAWS = 2000
    print("| seeds | images | spread over seeds | top-1 | difference |\n| ---: | ---: | ---: | ---: | ---: |")
    for num_images in (360, 10_000):
        for num_seeds, seed_sd_pct in ((1, 0.0), (3, 0.2), (3, 0.45), (3, 1.1), (10, 0.45), (10, 1.1)):
            found = simulate(num_seeds, num_images, seed_sd_pct, repetitions)
            shares = " | ".join(f"{100 * share:.1f} %" for share in found)
            print(f"| {num_seeds} | {num_images:,} | {seed_sd_pct} | {shares} |", flush=True)
