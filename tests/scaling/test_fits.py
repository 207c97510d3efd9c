"""What is fitted to a whole study: known answers, intervals, and what is not identified."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.scaling.findings import describe, make_findings
from pipeline.scaling.fits import Multiplier
from pipeline.scaling.intervals import Estimate
from pipeline.scaling.runs import Series
from pipeline.scaling.surfaces import MAX_WIDTH
from tests.scaling.synthetic import Arm, Law, X

BASE, OURS = Series("x"), Series("e")

RATIO = 100 ** (1 / 3)
"""Of neighbouring budgets in the default plan."""


def cheaper(law: Law, multiplier: float, size: float = 1.0) -> Law:
    """The law of an arm that has the loss of `law` at size * F and multiplier times the compute."""
    return law._replace(A=law.A * size**-law.a, B=law.B * (multiplier / size) ** -law.b)


def test_surface_frontier_and_optimal_size_of_a_known_law(analyzed):
    found = analyzed(arms={"x": Arm(X), "e": Arm(X, flops=0.5)}, sizes=np.geomspace(3e5, 1e8, 13))
    surface = found.surfaces[BASE].estimates
    assert [surface[name].value for name in ("A", "B", "E0", "a", "b")] == pytest.approx(
        [X.A, X.B, X.E0, X.a, X.b], rel=1e-3
    )
    assert surface["frontier"].value == pytest.approx(X.a * X.b / (X.a + X.b), rel=1e-3)
    assert all(profile.is_bracketed for profile in found.profiles[BASE])
    # Parabolas are not exact: log loss over log size is none.
    assert found.frontiers[BASE].estimates["g"].value == pytest.approx(0.18, abs=0.01)
    assert found.optimal_sizes[BASE].estimates["size"].value == pytest.approx(X.b / (X.a + X.b), abs=0.02)


@pytest.mark.parametrize("multiplier", [RATIO, 1 / RATIO])
def test_compute_multiplier_of_a_known_law(analyzed, multiplier):
    """With this ratio and these sizes, the profiles of the two arms are the same at neighbouring budgets."""
    found = analyzed(arms={"x": Arm(X), "e": Arm(cheaper(X, multiplier, size=2.0), flops=0.5)})
    average = found.compute_multipliers[OURS].average
    assert average.value == pytest.approx(multiplier, rel=1e-5)
    _, *at_budgets = (estimate.value for _, estimate in found.compute_multipliers[OURS].costs)
    assert at_budgets == pytest.approx(2 * [multiplier], rel=1e-5)


def test_data_multiplier_of_a_known_law(analyzed):
    """With so many repetitions that D is `reuse` times the unique images, twice the reuse is worth twice the images."""
    arms = {"x": Arm(X._replace(reuse=1e-4)), "e": Arm(X._replace(reuse=2e-4))}
    found = analyzed(arms=arms, sizes=(3e6,), budgets=(3e12,), fractions=(1, 0.5, 0.25, 0.125))
    assert found.data_multipliers[OURS].average.value == pytest.approx(2, rel=1e-3)


def test_noise_of_images_that_all_networks_share_leaves_a_ratio_alone(analyzed):
    arms = {"x": Arm(X), "e": Arm(cheaper(X, RATIO))}
    found = analyzed(arms=arms, image_noise=1.0, run_noise=0.0)
    average, loss = found.compute_multipliers[OURS].average, found.profiles[BASE][0].log_loss
    assert loss[1:].std() > 0.02, "a loss has the noise of the images"
    assert average.high / average.low == pytest.approx(1, abs=1e-3), "a paired ratio does not"


def test_seeds_that_differ_widen_intervals(analyzed):
    arms = {"x": Arm(X), "e": Arm(cheaper(X, RATIO))}
    average = analyzed(arms=arms, seed_noise=0.02).compute_multipliers[OURS].average
    assert average.low < 0.97 * RATIO and average.high > 1.03 * RATIO


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ({"sizes": (1e6, 4e6)}, "2 sizes with a finished run, fewer than 3"),
        ({"budgets": (3e11, 3e12)}, "2 budgets with a finished run, fewer than 3"),
        ({"arms": {"x": Arm(X._replace(E0=0.0)), "e": Arm(X)}}, "E0 is at the end of what is searched"),
    ],
)
def test_a_surface_that_is_not_identified_is_not_printed(analyzed, plan, reason):
    found = analyzed(**plan)
    assert found.surfaces[BASE].reason == reason and not found.surfaces[BASE].estimates
    findings = make_findings(found)
    assert any(reason in sentence and "L = E0 + A F^-a" in sentence for sentence in findings["not_identified"])
    row = dict(zip(findings["table"]["columns"], findings["table"]["rows"][0], strict=True))
    assert (row["a"]["text"], row["b"]["text"]) == ("–", "–")
    assert "surface" not in findings["paragraph"], "no comparison of exponents either"


def test_a_wide_interval_of_an_exponent_is_not_printed(analyzed):
    found = analyzed(sizes=np.geomspace(1e6, 4e6, 3), budgets=np.geomspace(1e12, 4e12, 3), seed_noise=0.05)
    reason = found.surfaces[BASE].reason
    assert f"more than {MAX_WIDTH}" in reason or "end of what is searched" in reason


def test_exponents_of_one_law_are_not_told_apart_and_those_of_two_are(analyzed):
    noise = {"seed_noise": 0.01, "budgets": np.geomspace(3e11, 1e14, 5)}
    same = analyzed(arms={"x": Arm(X), "e": Arm(cheaper(X, 1.5))}, **noise)
    assert same.exponents.differences["a"].holds(0) and not same.exponents.told_apart
    assert same.exponents.aicc_shared < same.exponents.aicc_separate
    assert "the exponents are not told apart" in make_findings(same)["paragraph"]
    other = analyzed(arms={"x": Arm(X), "e": Arm(X._replace(b=0.6, B=700.0))}, **noise)
    assert "b" in other.exponents.told_apart and other.exponents.aicc_separate < other.exponents.aicc_shared
    assert other.exponents.differences["b"].holds(0.15)
    assert "the exponents of their surfaces differ" in describe(other)


def test_the_share_of_the_gap_that_augmentation_closes(analyzed):
    arms = {
        "x": Arm(X._replace(E0=0.3), averaged=0.99),
        "x-flop": Arm(X._replace(E0=0.22), averaged=0.95),
        "e": Arm(X._replace(E0=0.2)),
    }
    found = analyzed(arms=arms, fractions=(1, 0.5), seed_noise=0.002)
    for gap in [*found.data_gaps, *found.budget_gaps]:
        assert gap.gap.value == pytest.approx(0.1, abs=0.02) and gap.is_open
        assert gap.closed[Series("x-flop")].value == pytest.approx(0.8, abs=0.2)
        assert gap.closed[Series("x-flop", averaged=True)].low > 1
        assert BASE not in gap.closed and OURS not in gap.closed
    epochs = [gap.epochs for gap in found.data_gaps]
    assert epochs[0] == pytest.approx(2 * epochs[1]), "half of the images, twice the epochs"


def test_arms_are_sorted_by_what_they_need_for_the_same_loss(analyzed):
    arms = {"x": Arm(X, averaged=0.9), "e": Arm(X), "h": Arm(cheaper(X, 2)), "w": Arm(cheaper(X, 0.5)), "n": Arm(X)}
    text = describe(analyzed(arms=arms, seed_noise=0.01))
    less, more = "less compute than x is needed by h and x averaged", "more compute than x is needed by w"
    assert f"Of the others, for the same loss: {less}; {more}; n cannot be told apart from x." in text


def test_no_gap_has_no_share(analyzed):
    found = analyzed(arms={"x": Arm(X), "x-flop": Arm(X), "e": Arm(X._replace(E0=0.3))}, fractions=(1, 0.5))
    assert all(not gap.is_open and set(gap.closed.values()) == {None} for gap in found.data_gaps)
    assert "There is no gap that x-flop could close" in make_findings(found)["paragraph"]


def test_a_finding_that_rests_on_the_sizes_and_budgets_tried_says_so(analyzed):
    """In the sentence both intervals are those of the same ratio, that of the arm that is behind."""
    multiplier = Multiplier(Estimate(0.8, 0.625, 0.9), Estimate(0.8, 0.5, 1.25), ())
    found = replace(analyzed(), compute_multipliers={OURS: multiplier})
    text = describe(found)
    assert "For the same loss, e needs 1.25 (1.11 to 1.6) times the compute of x" in text
    assert "the interval is 0.8 to 2 and holds 1: this rests on the sizes and budgets that were tried" in text


def test_curves_that_cross_by_chance_have_no_multiplier_of_data(analyzed):
    """Two numbers of images, and losses that differ by less than the noise."""
    found = analyzed(sizes=(3e6,), budgets=(3e12,), fractions=(1, 0.5), image_noise=1.0, run_noise=1.0, seeds=1)
    assert found.data_multipliers[OURS].average.holds(1)
    assert "with the same compute, cannot be told apart" in describe(found)


def test_one_seed_has_no_own_interval_and_is_counted(analyzed):
    found = analyzed(seeds=1)
    assert all(cell.num_seeds == 1 for cell in found.compute_cells[BASE])
    assert any("40 of 40 cells have one seed" in sentence for sentence in make_findings(found)["not_identified"])


@pytest.mark.parametrize(
    ("law", "found"),
    [
        (X, "In short: nothing was found that tells e and x apart."),
        (X._replace(A=45.0, B=65.0), "In short: e needs less compute than x for the same loss"),
        (X._replace(A=80.0, B=120.0), "In short: e needs more compute than x for the same loss"),
        (
            X._replace(A=10.0, B=10.0),
            "At none of its budgets does x reach a loss that e has at any: it needs 100 times",
        ),
        (
            X._replace(A=500.0, B=700.0),
            "At none of its budgets does e reach a loss that x has at any: it needs 100 times",
        ),
    ],
)
def test_what_was_found_goes_by_intervals(analyzed, law, found):
    assert found in describe(analyzed(arms={"x": Arm(X), "e": Arm(law)}, seed_noise=0.02))
