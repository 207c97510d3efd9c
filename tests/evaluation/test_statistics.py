"""Intervals and tests have the values of the literature, and hold the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluation import pairing, statistics
from pipeline.evaluation.predictions import ImageHits
from pipeline.evaluation.statistics import Interval
from tests.evaluation import coverage


@pytest.mark.parametrize(("hits", "total", "low", "high"), [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
])  # fmt: skip
def test_wilson_has_the_values_of_newcombe_1998(hits: int, total: int, low: float, high: float) -> None:
    assert statistics.wilson_interval(hits, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("only_first", "only_second", "p"), [
    (9, 1, 2 * (1 + 10) / 2**10),
    (1, 9, 2 * (1 + 10) / 2**10),
    (5, 0, 2 / 2**5),
    (4, 4, 1.0),
    (0, 0, 1.0),
])  # fmt: skip
def test_mcnemar_is_twice_the_binomial_tail(only_first: int, only_second: int, p: float) -> None:
    first = np.array([True] * 20 + [True] * only_first + [False] * only_second)
    second = np.array([True] * 20 + [False] * only_first + [True] * only_second)
    assert statistics.mcnemar_exact(first, second) == pytest.approx(p)


def test_bootstrap_of_one_seed_has_the_standard_error_of_a_proportion() -> None:
    hits = np.arange(2000)[None] < 1600
    low, high = statistics.bootstrap_interval(hits)
    error = 1.96 * np.sqrt(0.8 * 0.2 / 2000)
    assert (low, high) == pytest.approx((0.8 - error, 0.8 + error), abs=1e-3)
    assert statistics.bootstrap_interval(hits) == (low, high), "the same for the same hits"


def test_pairing_takes_out_what_both_networks_find_hard() -> None:
    rng = np.random.default_rng(0)
    shared = rng.random((1, 5000)) < 0.8
    better = shared | (rng.random((1, 5000)) < 0.1)  # right about a tenth of what the other is wrong about
    paired = statistics.paired_difference(better, shared)
    assert statistics.judge(paired) == "better" and paired.high - paired.low < 0.01
    unpaired = statistics.paired_difference(better[:, ::-1], shared)
    assert unpaired.high - unpaired.low > 0.02


def test_seeds_that_differ_widen_the_interval() -> None:
    images = np.arange(10_000)[None]
    same, different = (images < np.array(limits)[:, None] for limits in ([9000, 9000, 9000], [8700, 9000, 9300]))
    widths = [high - low for low, high in map(statistics.bootstrap_interval, (same, different))]
    assert widths[0] < 0.013 and widths[1] > 0.03
    low, high = statistics.paired_difference(different, same)
    assert low < -0.01 and high > 0.01


@pytest.mark.parametrize(("interval", "verdict"), [
    ((0.1, 2.0), "better"), ((-2.0, -0.1), "worse"), ((-0.1, 2.0), "cannot be told apart"),
    ((0.0, 2.0), "cannot be told apart"), ((-2.0, 0.0), "cannot be told apart"), ((0.0, 0.0), "cannot be told apart"),
])  # fmt: skip
def test_verdict_is_the_intervals(interval: tuple[float, float], verdict: str) -> None:
    assert statistics.judge(Interval(*interval)) == verdict


@pytest.mark.parametrize(("num_seeds", "seed_sd_pct", "low", "high"), [
    (1, 0.0, 0.92, 0.985),
    (3, 0.5, 0.93, 1.0),  # images decide: a little too wide, because seeds disagree about single images
    (3, 10.0, 0.70, 0.88),  # seeds decide, and three of them show too little of their spread
])  # fmt: skip
def test_intervals_hold_the_truth_as_often_as_the_docs_say(
    num_seeds: int, seed_sd_pct: float, low: float, high: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "NUM_DRAWS", 500)
    found = coverage.simulate(num_seeds, num_images=400, seed_sd_pct=seed_sd_pct, repetitions=200)
    assert low <= found.mean <= high and low <= found.difference <= high


@pytest.mark.parametrize("hits", [np.ones(5, bool), np.ones((0, 5), bool), np.ones((2, 0), bool)])
def test_hits_without_seeds_and_images_are_refused(hits: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected shape"):
        statistics.bootstrap_interval(hits)
    with pytest.raises(ValueError, match="expected shape"):
        statistics.paired_difference(np.ones((1, 5)), hits)


def test_different_numbers_of_images_are_refused() -> None:
    with pytest.raises(ValueError, match="5 and 6 images"):
        statistics.paired_difference(np.ones((1, 5)), np.ones((1, 6)))
    with pytest.raises(ValueError, match="5 and 6 images"):
        statistics.mcnemar_exact(np.ones(5), np.ones(6))


def test_a_comparison_is_in_points_and_tests_single_seeds_only() -> None:
    good, bad = (ImageHits(np.arange(1000) < limit, "images") for limit in (900, 880))
    one = pairing.compare("e-vit", [bad], "vit", [good])
    assert one.difference_pct == pytest.approx(-2) and one.verdict == "worse"
    assert one.interval.low < -2 < one.interval.high and one.mcnemar_p == pytest.approx(2 / 2**20)
    several = pairing.compare("e-vit", [bad, good], "vit", [good])
    assert several.difference_pct == pytest.approx(-1) and several.mcnemar_p is None
    assert (several.num_seeds, several.num_baseline_seeds) == (2, 1)


def test_runs_on_different_images_are_named() -> None:
    sides = [ImageHits(np.ones(10, bool), images) for images in ("these", "those")]
    with pytest.raises(pairing.PairingError, match="e-vit and vit were not evaluated on the same .* `dvc repro`"):
        pairing.compare("e-vit", sides[:1], "vit", sides[1:])
