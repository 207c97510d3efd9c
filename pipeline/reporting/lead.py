"""The paragraph at the top of the report: what equivariant networks cost and reach against X and S(X)."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.evaluation.pairing import Comparison
from pipeline.reporting.lead_figure import short_name
from pipeline.reporting.paper_sizes import Measurement
from pipeline.reporting.run_results import RunResult, group_by_seed, pooled_throughput_ratio
from pipeline.reporting.table import signed

_VARIANTS = ("E", "C2xC2", "D4")

_SMALL_FLOPS = 1e9  # the smallest of the paper's networks, E(ViT-S), takes 2.6e9


def lead_sentences(results: Sequence[RunResult], measurements: Sequence[Measurement]) -> list[str]:
    """Returns the sentences of the paragraph, first on E, then on networks for larger groups.

    There are none without an equivariant network that has an X. Runs with tuned recipes are left out.

    Args:
        measurements: those of the paper's sizes, which the report shows below.
    """
    results = [result for result in results if result.own_recipe_run is None]
    sentences = [sentence for variant in _VARIANTS for sentence in _describe_variant(variant, results)]
    if sentences and all(result.flops is not None and result.flops < _SMALL_FLOPS for result in results):
        below = ", which is measured below" * bool(measurements)
        sentences.append(f"Networks of this size say nothing about the speed of the paper's networks{below}.")
    return sentences


def _describe_variant(variant: str, results: Sequence[RunResult]) -> list[str]:
    equivariant = [
        members
        for members in group_by_seed(results)
        if members[0].variant == variant and members[0].baseline is not None
    ]
    pairs = {_pair_name(members, equivariant, results): members for members in equivariant}
    name = f"{variant}(X)"
    return [
        *_compare_flops(name, pairs),
        *_compare_top1(name, pairs),
        *_compare_speed(name, pairs),
        *_compare_symmetrized(name, pairs, results),
    ]


Pairs = dict[str, list[RunResult]]
"""All seeds of each E by the name of the pair."""


def _compare_flops(name: str, pairs: Pairs) -> list[str]:
    fractions = sorted(1 / members[0].flop_ratio for members in pairs.values() if members[0].flop_ratio)
    if not fractions:
        return []
    span = dict.fromkeys(f"{fraction:.2f}" for fraction in (fractions[0], fractions[-1]))
    return [f"{name} takes {' to '.join(span)} of the FLOPs of X."]


def _compare_top1(name: str, pairs: Pairs) -> list[str]:
    compared = [
        f"{pair} {_describe_difference(pooled.minus_baseline)}"
        for pair, members in pairs.items()
        if (pooled := members[0].pooled) and pooled.minus_baseline
    ]
    if not compared:
        return []
    return [f"Top-1 of {name} minus that of X, in points with its 95% interval: {'; '.join(compared)}."]


def _compare_speed(name: str, pairs: Pairs) -> list[str]:
    ratios = [f"{pair} {ratio}" for pair, members in pairs.items() if (ratio := pooled_throughput_ratio(members))]
    if not ratios:
        return []
    conditions = next(members[0].throughput_conditions for members in pairs.values() if members[0].throughput_ratios)
    return [f"Images per second of {name} over those of X, with quartiles: {'; '.join(ratios)} ({conditions})."]


def _compare_symmetrized(name: str, pairs: Pairs, results: Sequence[RunResult]) -> list[str]:
    """Returns a sentence on S(X), the weights of X averaged over a group, and one on E(X) against it."""
    symmetrized = {result.run: result for result in results if result.variant == "S"}
    rivals = {
        pair: (members, symmetrized[members[0].symmetrized_baseline])
        for pair, members in pairs.items()
        if members[0].symmetrized_baseline in symmetrized
    }
    fractions = [1 / rival.flop_ratio for _, rival in rivals.values() if rival.flop_ratio]
    if not fractions:
        return []
    span = " to ".join(dict.fromkeys(f"{fraction:.2f}" for fraction in (min(fractions), max(fractions))))
    group = "a group" if name == "E(X)" else f"the group of {name}"
    sentences = [f"S(X), the weights of X averaged over {group} without training, takes {span} of the FLOPs of X."]
    for text, differences in (
        ("S(X) minus that of X", {n: rival.pooled and rival.pooled.minus_baseline for n, (_, rival) in rivals.items()}),
        (
            f"{name} minus that of S(X)",
            {n: m[0].pooled and m[0].pooled.minus_symmetrized for n, (m, _) in rivals.items()},
        ),
    ):
        compared = [f"{pair} {_describe_difference(found)}" for pair, found in differences.items() if found]
        sentences += [f"Top-1 of {text}: {'; '.join(compared)}."] if compared else []
    return sentences


def _pair_name(
    members: Sequence[RunResult], equivariant: Sequence[Sequence[RunResult]], results: Sequence[RunResult]
) -> str:
    """Returns the name of X, or of E if X has several."""
    baseline = next(result for result in results if result.run == members[0].baseline)
    groups = {result.run: result.group for result in results}
    same = [other for other in equivariant if groups.get(other[0].baseline or "") == baseline.group]
    return short_name(baseline if len(same) == 1 else members[0], results)


def _describe_difference(comparison: Comparison) -> str:
    low, high = comparison.interval
    return f"{signed(comparison.difference_pct)} ({signed(low)} to {signed(high)}), {comparison.verdict}"
