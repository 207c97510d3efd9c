"""What is concluded from a sweep's numbers, and how it is said."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from pipeline.sweeps import analysis
from pipeline.sweeps.hybrid_sweep import summarize_splits


def test_pareto_front_holds_undominated_points() -> None:
    points = [(1.0, 80.0), (2.0, 90.0), (2.0, 85.0), (3.0, 90.0), (4.0, 95.0)]
    assert analysis.pareto_front(points) == [0, 1, 4]
    assert analysis.pareto_front([(1.0, 80.0), (1.0, 80.0)]) == [0, 1]


@pytest.mark.parametrize(
    ("values", "others", "expected"),
    [
        ([91.0, 92.0, 93.0], [90.0, 90.5, 90.9], True),  # 1 of 20 orders
        ([91.0, 92.0, 93.0], [90.0, 90.5, 91.0], False),  # a tie: 2 of 20
        ([91.0, 92.0, 93.0], [90.0, 90.5, 91.5], False),
        ([90.0, 90.5, 90.9], [91.0, 92.0, 93.0], False),
        ([91.0, 92.0], [90.0, 90.5], False),  # 1 of 6
        ([91.0], [90.0], False),
        ([91.0, 92.0, 93.0, 95.0], [90.0, 90.5, 90.6, 91.5], True),  # 2 of 70
        ([91.0, 92.0, 93.0, 95.0], [90.0, 90.5, 90.6, 92.5], False),  # 4 of 70
    ],
)
def test_better_is_what_chance_makes_in_one_of_twenty_cases(values: list, others: list, expected: bool) -> None:
    assert analysis.is_better(values, others) is expected


@pytest.mark.parametrize("seeds", [3, 4])
def test_equal_recipes_are_told_apart_in_at_most_one_of_twenty_cases(seeds: int) -> None:
    ranks = set(range(2 * seeds))
    splits = [set(chosen) for chosen in itertools.combinations(ranks, seeds)]
    errors = sum(analysis.is_better(list(chosen), list(ranks - chosen)) for chosen in splits)
    assert 0 < errors <= analysis.SIGNIFICANCE * len(splits)


def test_a_gain_that_can_no_longer_be_shown_is_known_early() -> None:
    assert analysis.can_become_better([91.0], [90.0], 3)
    assert not analysis.can_become_better([90.0], [90.0], 3)
    assert not analysis.can_become_better([91.0, 92.0], [90.0, 91.5], 3)
    assert analysis.can_become_better([91.0, 92.0], [90.0, 91.5], 4)


@pytest.mark.parametrize(
    ("full", "coefficient", "p_value", "is_shown"),
    [
        ([1, 2, 3, 4], 1.0, 1 / 24, True),
        ([1, 3, 2, 4], 0.8, 4 / 24, False),
        ([1, 2, 3, 5, 4], 0.9, 5 / 120, True),
        ([5, 4, 3, 2, 1], -1.0, 1.0, False),
        ([1, 2, 3], 1.0, 1 / 6, False),
        ([2, 2, 3], 0.866, 1 / 3, False),  # ties share a rank
    ],
)
def test_rank_correlation_has_known_values(full: list, coefficient: float, p_value: float, is_shown: bool) -> None:
    found = analysis.rank_correlation([float(number) for number in range(len(full))], full)
    assert found is not None and found.num_ranked == len(full)
    assert found.coefficient == pytest.approx(coefficient, abs=1e-3) and found.p_value == pytest.approx(p_value)
    assert found.is_shown is is_shown


def test_equal_values_have_no_rank() -> None:
    assert analysis.rank_correlation([1.0, 2.0], [5.0, 5.0]) is None
    assert analysis.rank_correlation([1.0], [5.0]) is None


FINDING: dict[str, Any] = {
    "search_epochs": 8,
    "full_epochs": 60,
    "own": {"top1_pct": 50.0},
    "best": {"top1_pct": 54.0, "is_own": False},
    "is_confirmed": False,
    "confirmed": {"own": [90.0, 91.0, 91.5], "best": [90.5, 92.0, 93.0], "seeds": [1, 2, 3]},
    "ranking": None,
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"best": None}, "no trial was trained to its end"),
        ({"best": {"is_own": True, "top1_pct": 50.0}}, "nothing is above its own recipe: the run keeps its own recipe"),
        ({}, "90.5 to 93.0% against 90.0 to 91.5%: not shown to be better: the run keeps its own recipe"),
        ({"is_confirmed": True}, "better, by a test that errs in at most 5% of such cases: it replaces the run's own"),
        ({"confirmed": {"own": [90, 91, 92], "best": [80, 81, 82]}}, "worse: the run keeps its own recipe"),
        ({"confirmed": {"own": [91.0], "best": [90.0]}}, "with 1 new seed and all 60 epochs, 90.0% against 91.0%: not"),
        ({"confirmed": {"own": [91.0], "best": [None]}}, "a training of the confirmation failed: the run keeps"),
        ({"confirmed": {"own": [], "best": []}}, "not confirmed: the run keeps its own recipe"),
    ],
)
def test_a_finding_says_which_recipe_goes_on(changes: dict, words: str) -> None:
    sentence = analysis.describe_recipe_finding({**FINDING, **changes})
    assert words in sentence and ("replaces" in sentence) == changes.get("is_confirmed", False)


@pytest.mark.parametrize(
    ("num_ranked", "coefficient", "p_value", "words"),
    [
        (2, 1.0, 0.5, "is 1.00 over 2 configurations, too few to tell whether the ranking carries over"),
        (4, 1.0, 1 / 24, "8 and 60 epochs is 1.00 over 4 configurations (p = 0.04): the ranking carries over"),
        (4, 0.8, 4 / 24, "(p = 0.17), which does not show that the ranking carries over"),
        (60, 0.3, 0.01, "(p = 0.01), which does not show that the ranking carries over"),
        (2, None, None, "cannot be rank-correlated: 2 configurations, too few or equal"),
    ],
)
def test_a_finding_says_whether_the_ranking_carries_over(
    num_ranked: int, coefficient: float | None, p_value: float | None, words: str
) -> None:
    ranking = {"configurations": [{}] * num_ranked, "coefficient": coefficient, "p_value": p_value}
    assert words in analysis.describe_recipe_finding({**FINDING, "ranking": ranking})


def split_row(k: int, flop_fraction: float, *top1: float) -> dict[str, Any]:
    mean = sum(top1) / len(top1)
    return {"k": k, "flop_fraction": flop_fraction, "top1": list(top1), "top1_pct": mean, "on_front": False}


def describe_splits(*rows: dict[str, Any]) -> str:
    return analysis.describe_split_finding({**summarize_splits(rows, 0.8), "epochs": 4, "full_epochs": 60})


def test_a_split_is_called_better_only_beyond_chance() -> None:
    rows = [
        split_row(0, 1.0, 95.0, 96.0, 97.0),
        split_row(1, 0.9, 89.0, 91.5, 93.0),
        split_row(2, 0.7, 90.0, 91.0, 92.0),
        split_row(3, 0.6, 80.0, 81.0, 82.0),
    ]
    sentence = describe_splits(*rows)
    assert "k = 2 has the highest mean top-1 after 4 of 60 epochs: 90.0 to 92.0% with 70% of the FLOPs" in sentence
    assert sentence.endswith("; it is better than k = 3; it cannot be told apart from k = 1; it is worse than k = 0")


def test_two_seeds_do_not_tell_splits_apart() -> None:
    sentence = describe_splits(split_row(0, 1.0, 95.0, 96.0), split_row(2, 0.7, 90.0, 91.0))
    assert sentence.endswith("; 3 seeds or more are needed to tell splits apart")
