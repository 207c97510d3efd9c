"""What a study does not tell, and why; and which runs are left out."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.scaling.fits import Analysis
from pipeline.scaling.formats import format_flops, join_words
from pipeline.scaling.runs import Series, Study
from pipeline.scaling.surfaces import Law

_MAX_LISTED = 10


def left_out(study: Study) -> list[str]:
    """Returns what was not trained, and what is left out of all fits and figures because it diverged or failed."""
    sentences = [f"Not trained: {'; '.join(study.not_trained)}."] if study.not_trained else []
    for state in ("diverged", "failed"):
        runs = [run for run in study.runs if run.state == state]
        if runs:
            named = [f"{run.trial} ({run.message})" if run.message else run.trial for run in runs[:_MAX_LISTED]]
            more = f" and {len(runs) - _MAX_LISTED} more" if len(runs) > _MAX_LISTED else ""
            sentences.append(f"{len(runs)} of {len(study.runs)} runs {state} and left out: {', '.join(named)}{more}.")
    return sentences


def unidentified(analysis: Analysis) -> list[str]:
    """Returns a sentence for everything that the runs do not determine."""
    study = analysis.study
    if not any(run.state == "finished" for run in study.runs):
        return [f"Nothing is fitted: of {len(study.runs)} runs none has finished."]
    sentences = []
    if study.num_images == 1:
        sentences.append("There is one validation image: the intervals do not hold for others.")
    sentences += _single_seeds(analysis)
    sentences += _not_bracketed(analysis)
    for title, laws in (
        ("The surface L = E0 + A F^-a + B D^-b", analysis.surfaces),
        ("The frontier L = E0 + K C^-g", analysis.frontiers),
        ("The power of the optimal size over compute", analysis.optimal_sizes),
        ("The slope of log loss over log compute", analysis.slopes),
    ):
        sentences += _reasons(title, laws)
    for title, found in (
        ("compute multiplier", analysis.compute_multipliers),
        ("data multiplier", analysis.data_multipliers),
    ):
        for series, multiplier in found.items():
            if multiplier.average is None:
                why = multiplier.reason or "undefined in more than a tenth of the resamples"
                sentences.append(f"The {title} of {series.in_words} is not given: {why}.")
    if not analysis.data_cells:
        sentences.append("There is no data study: no finished run has fewer unique images than others.")
    return sentences


def _single_seeds(analysis: Analysis) -> list[str]:
    cells = {
        (cell.series.arm, cell.size, cell.budget, cell.unique_images): cell.num_seeds
        for group in (analysis.compute_cells, analysis.data_cells)
        for found in group.values()
        for cell in found
    }
    single = sum(count == 1 for count in cells.values())
    if not single:
        return []
    return [
        f"{single} of {len(cells)} cells have one seed: the noise of their seeds is in the exponents of a surface, "
        "and in no other interval. They are drawn hollow."
    ]


def _not_bracketed(analysis: Analysis) -> list[str]:
    """One sentence for each series and end of the sizes tried."""
    sentences = []
    for series, profiles in analysis.profiles.items():
        if series.averaged:
            continue
        ends: dict[str, list[str]] = {}
        for profile in profiles:
            if profile.is_bracketed:
                continue
            if len(profile.log_f) < 3:
                end = "too few sizes for a parabola"
            else:
                low = profile.log_f_opt[0] - profile.log_f[0] <= profile.log_f[-1] - profile.log_f_opt[0]
                end = f"the {'smallest' if low else 'largest'} size is the best"
            ends.setdefault(end, []).append(format_flops(profile.budget))
        sentences += [
            f"The optimal size of {series} is not bracketed at {join_words(budgets)}: {end}."
            for end, budgets in ends.items()
        ]
    if sentences:
        sentences.append(
            "Where the optimal size is not bracketed, losses, slopes and multipliers are those of the best size tried. "
            "An arm whose best sizes were not tried looks worse than it is."
        )
    return sentences


def _reasons(title: str, laws: Mapping[Series, Law]) -> list[str]:
    """One sentence for each reason, with the series that have it."""
    groups: dict[str, list[str]] = {}
    for series, law in laws.items():
        if law.reason:
            groups.setdefault(law.reason, []).append(series.in_words)
    return [f"{title} of {join_words(names)} is not printed: {reason}." for reason, names in groups.items()]
