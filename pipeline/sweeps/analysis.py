"""Analysis of a sweep: the Pareto front, tests over seeds, rank correlation, and findings as sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.base.schema import Split

SIGNIFICANCE = 0.05
"""How often a test finds a difference between two configurations that have none: at most 1 in 20 times."""

MIN_SEEDS = 3
"""With fewer seeds on both sides, no outcome is significant: 2 and 2 values are in perfect order once in 6 times."""

MIN_RANKED = 4
"""With fewer configurations, no rank correlation is significant: 3 are in the same order once in 6 times."""

_MIN_CORRELATION = 0.5  # a lower one may be significant over many configurations, and is still no guide

_MAX_PERMUTATIONS = 10_000  # with more, p-values are estimates: from 8 seeds or 8 ranked configurations


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation."""

    coefficient: float
    p_value: float
    """Probability of a coefficient at least this high if the two orders have nothing to do with each other."""
    num_ranked: int

    @property
    def is_shown(self) -> bool:
        """Whether one order says something about the other."""
        return self.p_value <= SIGNIFICANCE and self.coefficient >= _MIN_CORRELATION


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns the indices of the points (cost, value) that no other point dominates.

    Points that are equal in both are all on the front.
    """
    return [
        number
        for number, (cost, value) in enumerate(points)
        if not any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points)
    ]


def is_better(values: Sequence[float], others: Sequence[float]) -> bool:
    """Whether `values` are higher than `others` by the one-sided Mann-Whitney test with exact permutations.

    For equal distributions the result is True with a probability of at most `SIGNIFICANCE`. With three values a side,
    it is True if every value is above every other value, which happens by chance in 1 of 20 cases.
    """
    if min(len(values), len(others)) < 2 or max(values) <= min(others):
        return False
    from scipy.stats import PermutationMethod, mannwhitneyu  # takes two seconds to import

    method: Any = PermutationMethod(n_resamples=_MAX_PERMUTATIONS, rng=0)
    return bool(mannwhitneyu(values, others, alternative="greater", method=method).pvalue <= SIGNIFICANCE)


def can_become_better(values: Sequence[float], others: Sequence[float], num_seeds: int) -> bool:
    """Whether `is_better` can still become True when there are `num_seeds` percentages on both sides."""
    missing = num_seeds - len(values)
    return is_better([*values, *[101.0] * missing], [*others, *[-1.0] * missing])


def rank_correlation(values: Sequence[float], others: Sequence[float]) -> RankCorrelation | None:
    """Returns Spearman's rank correlation, with a one-sided p-value by permutation. None if either side is constant."""
    if len(set(values)) < 2 or len(set(others)) < 2:
        return None
    from scipy.stats import permutation_test, spearmanr

    test = permutation_test(
        (values,),
        lambda permuted: spearmanr(permuted, others)[0],
        permutation_type="pairings",
        alternative="greater",
        vectorized=False,
        n_resamples=_MAX_PERMUTATIONS,
        rng=0,
    )
    return RankCorrelation(float(test.statistic), float(test.pvalue), len(values))


def describe_recipe_finding(finding: Mapping[str, Any]) -> str:
    """Returns a run's finding as a sentence."""
    best, own = finding["best"], finding["own"]
    if best is None:
        return "no trial was trained to its end"
    kept = "the run keeps its own recipe"
    search_epochs, full_epochs = finding["search_epochs"], finding["full_epochs"]
    if best["is_own"]:
        sentence = f"in the search, of {search_epochs} epochs, nothing is above its own recipe: {kept}"
    else:
        sentence = f"in the search, of {search_epochs} epochs, the best recipe reaches {best['top1_pct']:.1f}%" + (
            "" if own["top1_pct"] is None else f" against {own['top1_pct']:.1f}% for the run's own"
        )
        values, own_values = finding["confirmed"]["best"], finding["confirmed"]["own"]
        if not values:
            sentence += f", not confirmed: {kept}"
        elif None in (*values, *own_values):
            sentence += f"; a training of the confirmation failed: {kept}"
        else:
            seeds = f"{len(values)} new seed{'s' if len(values) > 1 else ''}"
            verdict = (
                f"better, by a test that errs in at most {SIGNIFICANCE:.0%} of such cases: it replaces the run's own"
                if finding["is_confirmed"]
                else f"worse: {kept}"
                if is_better(own_values, values)
                else f"not shown to be better: {kept}"
            )
            sentence += (
                f"; with {seeds} and all {full_epochs} epochs, {format_top1_range(values)} against "
                f"{format_top1_range(own_values)}: {verdict}"
            )
    if finding["ranking"]:
        sentence += f". {describe_ranking(finding)}"
    return sentence


def describe_ranking(finding: Mapping[str, Any]) -> str:
    """Returns a sentence on whether the search ranks configurations as full-length training does."""
    ranking, num_ranked = finding["ranking"], len(finding["ranking"]["configurations"])
    epochs = f"{finding['search_epochs']} and {finding['full_epochs']} epochs"
    if ranking["coefficient"] is None:
        return f"Top-1 after {epochs} cannot be rank-correlated: {num_ranked} configurations, too few or equal"
    correlation = RankCorrelation(ranking["coefficient"], ranking["p_value"], num_ranked)
    figures = f"is {correlation.coefficient:.2f} over {num_ranked} configurations"
    return f"Spearman's rank correlation of top-1 after {epochs} {figures}" + (
        ", too few to tell whether the ranking carries over"
        if num_ranked < MIN_RANKED
        else f" (p = {correlation.p_value:.2f}): the ranking carries over"
        if correlation.is_shown
        else f" (p = {correlation.p_value:.2f}), which does not show that the ranking carries over"
    )


def format_top1_range(values: Sequence[float]) -> str:
    """Formats the range of several top-1 values."""
    low, high = min(values), max(values)
    return f"{low:.1f}%" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}%"


def format_splits(splits: Sequence[Split]) -> str:
    """Formats splits as words: "k = 1, 2 and d4:1,c2:2"."""
    numbers = ", ".join(str(split) for split in splits if isinstance(split, int))
    return " and ".join([f"k = {numbers}"] * bool(numbers) + [split for split in splits if isinstance(split, str)])


def describe_split_finding(found: Mapping[str, Any]) -> str:
    """Returns a family's finding as a sentence."""
    best = found["best"]
    if best is None:
        return f"no split within {found['flop_budget']:.0%} of X's FLOPs was trained to its end"
    sentence = (
        f"within {found['flop_budget']:.0%} of X's FLOPs, {format_splits([best['k']])} has the highest mean top-1 "
        f"after {found['epochs']} of {found['full_epochs']} epochs: {format_top1_range(best['top1'])} with "
        f"{best['flop_fraction']:.0%} of the FLOPs"
    )
    if len(best["top1"]) < MIN_SEEDS:
        return f"{sentence}; {MIN_SEEDS} seeds or more are needed to tell splits apart"
    groups = (("it is better than", "worse"), ("it cannot be told apart from", "alike"), ("it is worse than", "better"))
    for text, group in groups:
        if found[group]:
            sentence += f"; {text} {format_splits(found[group])}"
    return sentence
