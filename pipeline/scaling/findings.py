"""What a study found, in sentences: findings.json, which the report shows. "Better" and "worse" go by intervals."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.scaling.findings_table import make_table
from pipeline.scaling.fits import Analysis
from pipeline.scaling.formats import format_number, join_words, percent, signed
from pipeline.scaling.gaps import Gap
from pipeline.scaling.intervals import Estimate, format_estimate
from pipeline.scaling.runs import Series
from pipeline.scaling.unidentified import left_out, unidentified


def make_findings(analysis: Analysis) -> dict[str, Any]:
    """Returns the content of findings.json."""
    study = analysis.study
    return {
        "title": "Scaling study" + (" (a control)" if not study.flop_invariant else ""),
        "control": control_note(analysis),
        "paragraph": describe(analysis),
        "table": make_table(analysis),
        "left_out": left_out(study),
        "not_identified": unidentified(analysis),
        "method": _method(analysis),
    }


def control_note(analysis: Analysis) -> str:
    """Returns what is to be expected where labels change under a flop; an empty string where they do not."""
    study = analysis.study
    if study.flop_invariant:
        return ""
    return (
        f"A control: the labels of {study.data} change under a flop, so {study.equivariant} has the wrong symmetry "
        "here and is expected to be worse. This study shows that the method can say so, and nothing about images whose "
        "labels do not change."
    )


def describe(analysis: Analysis) -> str:
    """Returns the paragraph on what was found."""
    if analysis.baseline not in analysis.profiles or analysis.equivariant not in analysis.profiles:
        missing = [str(s) for s in (analysis.baseline, analysis.equivariant) if s not in analysis.profiles]
        return f"Nothing can be said: no run of {join_words(missing)} has finished."
    sentences = [
        _describe_compute(analysis),
        _describe_seeds(analysis),
        _describe_trend(analysis),
        _describe_exponents(analysis),
        _describe_split(analysis),
        _describe_data(analysis),
        _describe_augmentation(analysis),
        _describe_others(analysis),
    ]
    return " ".join([_in_short(analysis), *(sentence for sentence in sentences if sentence)])


def _in_short(analysis: Analysis) -> str:
    ours, base = analysis.equivariant, analysis.baseline
    found = []
    multiplier = analysis.compute_multipliers[ours].average
    if multiplier and multiplier.low > 1:
        found.append(f"{ours} needs less compute than {base} for the same loss")
    if multiplier and multiplier.high < 1:
        found.append(f"{ours} needs more compute than {base} for the same loss")
    data = analysis.data_multipliers.get(ours)
    if data and data.average and not data.average.holds(1.0):
        amount = "fewer" if data.average.low > 1 else "more"
        found.append(f"{ours} needs {amount} images than {base} for the same loss")
    if analysis.slope_difference and not analysis.slope_difference.holds(0.0):
        steeper, other = (ours, base) if analysis.slope_difference.low > 0 else (base, ours)
        found.append(f"the loss of {steeper} falls faster with compute than that of {other}")
    if analysis.exponents.are_separate:
        found.append("the exponents of their surfaces differ")
    if analysis.optimal_size_difference and not analysis.optimal_size_difference.holds(0.0):
        found.append("the optimal split of compute into size and images differs")
    if not found:
        return f"In short: nothing was found that tells {ours} and {base} apart."
    return f"In short: {'; '.join(found)}."


def _describe_compute(analysis: Analysis) -> str:
    ours, base = analysis.equivariant, analysis.baseline
    multiplier = analysis.compute_multipliers[ours]
    average, level = multiplier.average, percent(analysis.study.confidence)
    if average is None:
        why = multiplier.reason or "it is undefined in too many resamples"
        return f"How much compute {ours} and {base} need for the same loss is not known: {why}."
    if average.holds(1.0):
        text = f"The compute that {ours} and {base} need for the same loss cannot be told apart"
        return f"{text}{_details(f'{base} needs', average, f'that of {ours}')} ({level} interval)."
    behind, ahead, ratio = (base, ours, average) if average.low > 1 else (ours, base, _inverse(average))
    if np.isinf(ratio.value):
        return (
            f"At none of its budgets does {behind} reach a loss that {ahead} has at any: it needs "
            f"{format_number(ratio.low)} times the compute or more ({level} interval)."
        )
    text = (
        f"For the same loss, {behind} needs {_times(ratio)} the compute of {ahead} ({level} interval, average over all "
        "losses that both reach)."
    )
    wider = multiplier.average_resampled
    if wider and wider.holds(1.0):
        interval = _range(wider if behind == base else _inverse(wider))
        text += (
            f" If sizes and budgets are resampled too, the interval is {interval} and holds 1: this rests on the sizes "
            "and budgets that were tried."
        )
    return text


def _describe_seeds(analysis: Analysis) -> str:
    cells = [*analysis.compute_cells[analysis.baseline], *analysis.compute_cells[analysis.equivariant]]
    single = sum(cell.num_seeds == 1 for cell in cells)
    if not single:
        return ""
    return f"With one seed in {single} of their {len(cells)} cells, these intervals are narrower than they should be."


def _describe_trend(analysis: Analysis) -> str:
    difference, ours, base = analysis.slope_difference, analysis.equivariant, analysis.baseline
    if difference is None:
        return ""
    powers = [f"{-analysis.slopes[series].estimates['slope'].value:.3f}" for series in (base, ours)]
    text = (
        f"Over the budgets, the loss goes as compute to the power of {powers[0]} for {base} and {powers[1]} for "
        f"{ours}; the difference, {format_estimate(difference, signed)},"
    )
    return f"{text} cannot be told from 0." if difference.holds(0.0) else f"{text} is not 0."


def _describe_exponents(analysis: Analysis) -> str:
    found = analysis.exponents
    if found.reason or not found.differences:
        return ""
    listed = ", ".join(f"{name} {format_estimate(found.differences[name], signed)}" for name in ("a", "b"))
    apart = [name for name in ("a", "b") if name in found.told_apart]
    verdict = f"{join_words(apart)} can be told apart" if apart else "the exponents are not told apart"
    arms = f"{analysis.equivariant} minus {analysis.baseline}"
    text = f"In the surface L = E0 + A F^-a + B D^-b, {verdict} ({arms}: {listed})"
    if found.aicc_shared is not None and found.aicc_separate is not None:
        shared = found.aicc_shared < found.aicc_separate
        by = abs(found.aicc_shared - found.aicc_separate)
        text += f"; AICc is lower by {by:.1f} with {'shared' if shared else 'separate'} exponents"
    return f"{text}."


def _describe_split(analysis: Analysis) -> str:
    difference = analysis.optimal_size_difference
    if difference is None:
        return ""
    powers = [
        f"{format_number(analysis.optimal_sizes[series].estimates['size'].value)} for {series}"
        for series in (analysis.baseline, analysis.equivariant)
    ]
    verdict = "which cannot be told apart" if difference.holds(0.0) else "which differ"
    return (
        f"The optimal FLOPs of an image grow as compute to the power of {join_words(powers)}, {verdict} "
        f"({format_estimate(difference, signed)})."
    )


def _describe_data(analysis: Analysis) -> str:
    ours, base = analysis.equivariant, analysis.baseline
    multiplier = analysis.data_multipliers.get(ours)
    if multiplier is None or multiplier.average is None:
        return ""
    average = multiplier.average
    if average.holds(1.0):
        text = f"The unique images that {ours} and {base} need for the same loss, with the same compute, cannot be told"
        return f"{text} apart{_details(f'{base} needs', average, f'those of {ours}')}."
    behind, ahead, ratio = (base, ours, average) if average.low > 1 else (ours, base, _inverse(average))
    if np.isinf(ratio.value):
        return f"With all of its images, {behind} does not reach the loss that {ahead} has with the fewest."
    return f"With the same compute, {behind} needs {_times(ratio)} the unique images of {ahead} for the same loss."


def _describe_augmentation(analysis: Analysis) -> str:
    augmented = analysis.study.augmented
    if augmented is None or Series(augmented) not in analysis.profiles:
        return ""
    gaps, where = analysis.data_gaps, "number of unique images"
    if not gaps:
        gaps, where = analysis.budget_gaps, "budget"
    still = [gap for gap in gaps if gap.is_open]
    if not still:
        known = [gap for gap in gaps if gap.gap]
        worse = [gap for gap in known if gap.gap and gap.gap.high < 0]
        where_worse = f"; it is worse at {len(worse)} of {len(known)}" if worse else ""
        return (
            f"There is no gap that {augmented} could close: at no {where} is {analysis.equivariant} shown to be better "
            f"than {analysis.baseline}{where_worse}."
        )
    series = [Series(augmented), Series(augmented, averaged=True)]
    ordered = sorted(still, key=lambda gap: gap.epochs)
    shown = ordered if len(ordered) == 1 else [ordered[0], ordered[-1]]
    sentences = []
    for each in series:
        parts = [part for gap in shown if (part := _closed(gap, each))]
        if parts:
            cost = ", at twice the FLOPs at test time," if each.averaged else ""
            gap = f"Of the gap between {analysis.baseline} and {analysis.equivariant}"
            sentences.append(f"{gap}, {each.in_words}{cost} closes {join_words(parts)}.")
    return " ".join(sentences)


def _closed(gap: Gap, series: Series) -> str:
    share = gap.closed.get(series)
    if share is None:
        return ""
    amount = f"more than all (at least {percent(share.low)})" if share.low > 1 else format_estimate(share, percent)
    amount += ", not told apart from all," if share.holds(1.0) else ""
    return f"{amount} at {format_number(gap.epochs)} epochs"


def _describe_others(analysis: Analysis) -> str:
    """Which of the other series need less or more compute than the baseline."""
    base = analysis.study.baseline
    less, more, alike = [], [], []
    for series, multiplier in analysis.compute_multipliers.items():
        average = multiplier.average
        if series == analysis.equivariant or average is None:
            continue
        (less if average.low > 1 else more if average.high < 1 else alike).append(series.in_words)
    clauses = [
        f"{amount} compute than {base} is needed by {join_words(names)}"
        for amount, names in (("less", less), ("more", more))
        if names
    ]
    clauses += [f"{join_words(alike)} cannot be told apart from {base}"] if alike else []
    return f"Of the others, for the same loss: {'; '.join(clauses)}." if clauses else ""


def _method(analysis: Analysis) -> str:
    study = analysis.study
    images = f"{study.num_images:,} validation image{'s' * (study.num_images != 1)}"
    return (
        f"{percent(study.confidence)} intervals by percentile bootstrap of {study.bootstrap:,} draws over {images}, "
        "which all networks share, and over the seeds of each cell (size and budget); for the exponents of a surface, "
        "over the cells. Compute is 3 x the FLOPs of a forward pass x the images seen, so it is that of training. "
        "Averaged: the softmax of an image and of its flop, averaged, at twice the FLOPs of a prediction. "
        "Each interval stands for itself: they are not corrected for their number. docs/scaling.md has the definitions."
    )


def _times(multiplier: Estimate) -> str:
    return f"{format_estimate(multiplier, format_number)} times"


def _details(before: str, multiplier: Estimate, after: str) -> str:
    """Returns what follows `cannot be told apart`: nothing if no loss is reached by both."""
    return "" if np.isinf(multiplier.value) else f": {before} {_times(multiplier)} {after}"


def _range(estimate: Estimate) -> str:
    return format_estimate(estimate, format_number).partition(" (")[2].rstrip(")")


def _inverse(multiplier: Estimate) -> Estimate:
    def invert(bound: float) -> float:
        return -bound if np.isinf(bound) else 1 / bound

    return Estimate(invert(multiplier.value), invert(multiplier.high), invert(multiplier.low))
