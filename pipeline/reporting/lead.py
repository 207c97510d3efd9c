"""The paragraph at the top of the report: what E(X) costs and reaches against X, and what the figures cannot show."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.base.config import Experiment
from pipeline.evaluation.pairing import Comparison
from pipeline.evaluation.statistics import Verdict
from pipeline.reporting.lead_figure import short_name
from pipeline.reporting.paper_sizes import Measurement
from pipeline.reporting.run_results import RunResult, group_by_seed, pooled_throughput_ratio
from pipeline.reporting.table import signed

_SMALL_FLOPS = 1e9  # the smallest of the paper's networks, E(ViT-S), takes 2.6e9

_VERDICTS: tuple[Verdict, ...] = ("better", "worse", "cannot be told apart")

_NO_MIRRORING = (
    "No recipe mirrors training images (flop_prob is 0), because a mirrored image may have another label. E(X) gives an "
    "image and its mirror image the same answer, so it is expected to fall behind X on this data."
)


def lead_sentences(
    experiment: Experiment, results: Sequence[RunResult], measurements: Sequence[Measurement]
) -> list[str]:
    """Returns the sentences of the paragraph; none without an E that has an X. Runs with tuned recipes are left out.

    Args:
        measurements: those of the paper's sizes, which the report shows below.
    """
    results = [result for result in results if result.own_recipe_run is None]
    pairs = {
        short_name(members[0], results): members
        for members in group_by_seed(results)
        if members[0].variant == "E" and members[0].baseline
    }
    if not pairs:
        return []
    sentences = [*_compare_flops(pairs), *_compare_top1(pairs), *_compare_speed(pairs)]
    if all(result.flops is not None and result.flops < _SMALL_FLOPS for result in results):
        below = ", which is measured below" * bool(measurements)
        sentences.append(f"Networks of this size say nothing about the speed of the paper's networks{below}.")
    if all(experiment.resolved(result.run)["recipe"]["flop_prob"] == 0 for result in results):
        sentences.append(_NO_MIRRORING)
    return sentences


Pairs = dict[str, list[RunResult]]
"""All seeds of each E by its name."""


def _compare_flops(pairs: Pairs) -> list[str]:
    fractions = sorted(1 / members[0].flop_ratio for members in pairs.values() if members[0].flop_ratio)
    if not fractions:
        return []
    span = dict.fromkeys(f"{fraction:.2f}" for fraction in (fractions[0], fractions[-1]))
    return [f"E(X) takes {' to '.join(span)} of the FLOPs of X."]


def _compare_top1(pairs: Pairs) -> list[str]:
    """Returns one sentence with all pairs, grouped by verdict."""
    found: dict[Verdict, list[str]] = {verdict: [] for verdict in _VERDICTS}
    for name, members in pairs.items():
        if (pooled := members[0].pooled) and pooled.minus_baseline:
            found[pooled.minus_baseline.verdict].append(f"{name} ({_format_difference(pooled.minus_baseline)})")
    phrases = [f"{verdict} for {_join(names)}" for verdict, names in found.items() if names]
    if not phrases:
        return []
    return [f"Its top-1 against that of X, by the 95% interval of the difference: {'; '.join(phrases)}."]


def _compare_speed(pairs: Pairs) -> list[str]:
    ratios = [f"{name} {ratio}" for name, members in pairs.items() if (ratio := pooled_throughput_ratio(members))]
    if not ratios:
        return []
    conditions = next(members[0].throughput_conditions for members in pairs.values() if members[0].throughput_ratios)
    return [f"Its images per second over those of X, with quartiles, on {conditions}: {_join(ratios)}."]


def _format_difference(comparison: Comparison) -> str:
    low, high = comparison.interval
    return f"{signed(comparison.difference_pct)} points, {signed(low)} to {signed(high)}"


def _join(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
