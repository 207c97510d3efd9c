"""The figures of both sweeps, drawn from the files that they left."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipeline.base.files import read_json
from pipeline.base.plotting import MATPLOTLIB_STYLE, RenderedFigure, mark_gid, render_figure
from pipeline.sweeps.analysis import MIN_RANKED, format_splits

IMPORTANCE_METHOD = "fANOVA"
"""Whose measure of importance it is."""

_EPOCHS = ("search_epochs", "full_epochs")

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")


def draw_recipe_sweep(folder: Path) -> list[RenderedFigure]:
    """Of the recipe sweep: history, full-length training against the search, parameter importance and parallel
    coordinates; none where nothing was swept.
    """
    findings = read_json(folder / "findings.json", {})
    trials = _load_trials(folder / "trials.csv")
    if not findings or not trials:
        return []
    with matplotlib.rc_context(MATPLOTLIB_STYLE):
        return [
            render_figure(
                "sweep_history",
                "Recipe sweep: history",
                "Best validation top-1 of every trial in the order of the plan; the line is the best so far among "
                "those of the search trained to their end. Hollow: stopped early; crosses: diverged or failed; "
                "squares: the confirmation, with new seeds and all epochs of the recipe.",
                _plot_history(trials, list(findings)),
                trials,
            ),
            *_draw_ranking(findings),
            render_figure(
                "sweep_importance",
                "Recipe sweep: parameter importance",
                f"Share of each field in the variance of top-1 over the trials, by "
                f"Optuna's {IMPORTANCE_METHOD}. With few "
                "trials this is a hint.",
                _plot_importance(findings),
                [
                    {"run": run, "field": field, "importance": share}
                    for run, run_findings in findings.items()
                    for field, share in run_findings["importance"].items()
                ],
            ),
            render_figure(
                "sweep_parallel",
                "Recipe sweep: parallel coordinates",
                "Every trial of the search as a line through its values, light to dark by top-1; dashed: the run's "
                "own recipe.",
                _plot_parallel(trials, findings),
                [trial for trial in trials if not trial["confirms"]],
            ),
        ]


def _draw_ranking(findings: Mapping[str, Any]) -> list[RenderedFigure]:
    """Full-length training against the search; none without a confirmation."""
    rows = [
        {"run": run, **configuration}
        for run, found in findings.items()
        if found["ranking"]
        for configuration in found["ranking"]["configurations"]
    ]
    if not rows:
        return []
    return [
        render_figure(
            "sweep_ranking",
            "Recipe sweep: search and full length",
            "Validation top-1 of a configuration in the search and when it is trained for all epochs of the recipe, "
            "with a new seed. Where the search's ranking carries over, the points rise from left to right. "
            "Squares: the run's own recipe.",
            _plot_ranking(rows, findings),
            rows,
        )
    ]


def draw_hybrid_sweep(folder: Path) -> list[RenderedFigure]:
    """Of the split sweep: accuracy against FLOPs with the Pareto fronts; none where nothing was swept."""
    rows = read_json(folder / "findings.json", {}).get("splits", [])
    if not rows:
        return []
    with matplotlib.rc_context(MATPLOTLIB_STYLE):
        return [
            render_figure(
                "sweep_pareto",
                "Split sweep: accuracy against FLOPs",
                "Validation top-1 by FLOPs for every number k of equivariant blocks and every choice of groups by "
                "depth: the mean over the seeds, bars from the lowest to the highest. Filled points and the line are "
                "the Pareto front of their family.",
                _plot_front(rows),
                [{**row, "top1": " ".join(map(str, row["top1"]))} for row in rows],
            )
        ]


def _plot_history(trials: Sequence[Mapping[str, Any]], runs: Sequence[str]) -> Figure:
    figure = Figure(figsize=(5.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for color, run in zip(_COLORS * len(runs), runs, strict=False):
        trials_of_run = [trial for trial in trials if trial["run"] == run]
        best, line = None, []
        for number, trial in enumerate(trials_of_run):
            value = trial["top1_pct"]
            if value is None:
                continue
            gid = mark_gid(run, f"{trial['trial']}, {trial['state']}: top-1 {value:.1f}%")
            if trial["state"] in ("diverged", "failed"):
                axes.plot(number, value, "x", color=color, gid=gid)
                continue
            face = color if trial["state"] == "finished" else "white"
            axes.plot(number, value, "s" if trial["confirms"] else "o", color=color, markerfacecolor=face, gid=gid)
            if trial["state"] == "finished" and not trial["confirms"]:
                best = max(value, best or value)
                line.append((number, best))
        if line:
            axes.plot(*zip(*line, strict=True), color=color, label=run, drawstyle="steps-post", alpha=0.6)
    axes.set(xlabel="trial", ylabel="validation top-1 (%)")
    axes.legend()
    return figure


def _plot_ranking(rows: Sequence[Mapping[str, Any]], findings: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for color, (run, found) in zip(_COLORS * len(findings), findings.items(), strict=False):
        ranking = found["ranking"] or {"configurations": [], "coefficient": None}
        is_known = ranking["coefficient"] is not None and len(ranking["configurations"]) >= MIN_RANKED
        correlation = f", Spearman {ranking['coefficient']:.2f}" if is_known else ""
        axes.plot([], [], "o", color=color, label=f"{run}{correlation}")
        for row in (row for row in rows if row["run"] == run):
            x, y = row["search_top1_pct"], row["full_top1_pct"]
            description = f"{row['trial']}: top-1 {x:.1f}% in the search, {y:.1f}% at full length"
            axes.plot(x, y, "s" if row["is_own"] else "o", color=color, gid=mark_gid(run, description))
    epochs = {key: "/".join(sorted({str(found[key]) for found in findings.values()})) for key in _EPOCHS}
    axes.set(
        xlabel=f"top-1 (%) in the search, {epochs['search_epochs']} epochs",
        ylabel=f"top-1 (%), {epochs['full_epochs']} epochs",
    )
    axes.margins(0.1)
    axes.legend()
    return figure


def _plot_importance(findings: Mapping[str, Any]) -> Figure:
    fields = list(dict.fromkeys(field for run_findings in findings.values() for field in run_findings["importance"]))
    figure = Figure(figsize=(5.4, 1.2 + 0.4 * max(1, len(fields))), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(findings)
    for number, (run, run_findings) in enumerate(findings.items()):
        places = [place + number * height for place in range(len(fields))]
        shares = [run_findings["importance"].get(field, 0.0) for field in fields]
        axes.barh(places, shares, height, label=run, color=_COLORS[number % len(_COLORS)])
    axes.set(yticks=[place + 0.4 - height / 2 for place in range(len(fields))], yticklabels=fields, xlabel="importance")
    axes.invert_yaxis()
    axes.legend()
    return figure


def _plot_parallel(trials: Sequence[Mapping[str, Any]], findings: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(5.4, 2.9 * len(findings)), layout="constrained")
    for axes, (run, run_findings) in zip(
        figure.subplots(len(findings), squeeze=False)[:, 0], findings.items(), strict=True
    ):
        fields = list(run_findings["own"]["params"])
        lines = [t for t in trials if t["run"] == run and not t["confirms"] and t["top1_pct"] is not None]
        scales = {
            field: _scale_values([t.get(field, "") for t in lines], field in run_findings["log_fields"])
            for field in fields
        }
        top1 = [t["top1_pct"] for t in lines]
        low, high = (min(top1), max(top1)) if top1 else (0.0, 1.0)
        for number, trial in enumerate(lines):
            shade = (trial["top1_pct"] - low) / ((high - low) or 1)
            axes.plot(
                range(len(fields)),
                [scales[field][0][trial.get(field, "")] for field in fields],
                color=matplotlib.colormaps["Blues"](0.25 + 0.75 * shade),
                linestyle="--" if number == 0 else "-",
                linewidth=1.2 + shade,
                zorder=2 + shade,
                gid=mark_gid(
                    trial["trial"],
                    f"{trial['trial']}: top-1 {trial['top1_pct']:.1f}%; "
                    + ", ".join(f"{field} {trial.get(field) or 'default'}" for field in fields),
                ),
            )
        for place, field in enumerate(fields):
            for height, text in zip((-0.02, 1.02), scales[field][1], strict=True):
                axes.text(place, height, text, ha="center", va="top" if height < 0 else "bottom", fontsize=7)
        names = [field.removeprefix("args.").replace("_", "\n") for field in fields]
        axes.set(
            xticks=range(len(fields)),
            xticklabels=names,
            yticks=[],
            ylim=(-0.12, 1.12),
            title=f"{run}: top-1 {low:.1f} to {high:.1f} %",
        )
        axes.tick_params(axis="x", labelsize=7.5)
        axes.title.set_fontsize(9)
    return figure


def _scale_values(values: Sequence[str], log: bool) -> tuple[dict[str, float], tuple[str, str]]:
    """Each value's height from 0 to 1, and the words at both ends; words that are no numbers by their order."""
    known = sorted(set(values))
    try:
        numbers = {value: math.log(float(value)) if log else float(value) for value in known}
    except ValueError:
        numbers = {value: float(place) for place, value in enumerate(known)}
    ordered = sorted(numbers, key=lambda value: numbers[value])
    low, high = numbers[ordered[0]], numbers[ordered[-1]]
    heights = {value: (number - low) / (high - low) if high > low else 0.5 for value, number in numbers.items()}
    ends = (ordered[0] or "default", ordered[-1] or "default")
    return heights, ends if high > low else (ends[0], "")


def _plot_front(rows: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(5.4, 4.4), layout="constrained")
    axes = figure.subplots()
    unit, name = (1e9, "GFLOPs") if max(row["flops"] for row in rows) >= 1e9 else (1e6, "MFLOPs")
    handles = []
    for number, run in enumerate(dict.fromkeys(row["run"] for row in rows)):
        color = _COLORS[number % len(_COLORS)]
        rows_of_run = [row for row in rows if row["run"] == run and row["top1"]]
        front = sorted((row["flops"] / unit, row["top1_pct"]) for row in rows_of_run if row["on_front"])
        if front:
            axes.plot(*zip(*front, strict=True), color=color, alpha=0.5, linewidth=1.2)
        for row in rows_of_run:
            x, y = row["flops"] / unit, row["top1_pct"]
            axes.plot([x, x], [min(row["top1"]), max(row["top1"])], color=color, linewidth=1, alpha=0.6)
            description = (
                f"{run}, {format_splits([row['k']])}: {x:.4g} {name}, top-1 {y:.1f}% "
                f"({min(row['top1']):.1f} to {max(row['top1']):.1f}, {len(row['top1'])} seeds)"
            )
            axes.plot(
                x,
                y,
                "o",
                color=color,
                markerfacecolor=color if row["on_front"] else "white",
                gid=mark_gid(run, description),
            )
            axes.annotate(
                format_splits([row["k"]]).replace(" = ", "="),
                (x, y),
                (5, 4),
                textcoords="offset points",
                fontsize=8,
                color=color,
            )
        handles.append(Line2D([], [], color=color, marker="o", label=run))
    axes.set(xlabel=f"{name} per image", ylabel="validation top-1 (%)")
    axes.margins(x=0.1)
    axes.legend(handles=handles)
    return figure


def _load_trials(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [
            {**row, "top1_pct": float(row["top1_pct"]) if row["top1_pct"] else None, "confirms": row["confirms"] == "1"}
            for row in csv.DictReader(file)
        ]
