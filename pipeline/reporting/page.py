"""Writes the report: an HTML page, Markdown, figures and their data, metrics, and a card for every run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2

from flopeq.groups import C2
from flopeq.hub.model_card import TrainedRun, render_card
from flopeq.registry import describe
from pipeline.base.config import Experiment
from pipeline.evaluation.statistics import NUM_DRAWS
from pipeline.reporting import figures, sweep_sections
from pipeline.reporting.lead import lead_sentences
from pipeline.reporting.lead_figure import draw_lead_figure
from pipeline.reporting.paper_sizes import load_measurements
from pipeline.reporting.paper_sizes_section import make_section
from pipeline.reporting.run_results import RunResult
from pipeline.reporting.scaling_section import load_section
from pipeline.reporting.table import (
    Table,
    build_table,
    flop_unit,
    further_set_names,
    has_metric,
    param_unit,
    summarize_runs,
)

INPUT_BOUND_PCT = 10.0
"""From this share of waiting on, the report says that a training was bound by its input."""


@dataclass(frozen=True)
class Link:
    """A link from a row of the table to a file or page of its run."""

    text: str
    url: str
    hint: str = ""


def write_report(
    experiment: Experiment,
    results: Sequence[RunResult],
    reports: Path = Path("reports"),
    sweeps: Path = Path("sweeps"),
    scaling: Path = Path("scaling"),
    outputs: Path = Path("outputs"),
    measured: Path = Path("results"),
    runs_url: str | None = None,
    run_urls: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Table, Path]:
    """Writes everything into `reports`. Returns the table and the page's path.

    Args:
        scaling: the folder of the scaling study.
        measured: the folder of committed measurements, of which the report shows those of GPUs.
        runs_url: address of all runs in MLflow.
        run_urls: address of each run in MLflow, by its MLflow id.
    """
    table = build_table(results)
    rendered_figures = figures.draw_figures(results, flop_unit(results), param_unit(results))
    lead_figure = draw_lead_figure(results, flop_unit(results))
    measurements = load_measurements(reports, measured)
    paper_sizes = make_section(measurements)
    sections = sweep_sections.load_sections(sweeps)
    scaling_study = load_section(scaling)
    for folder in ("figures", "cards"):
        (reports / folder).mkdir(parents=True, exist_ok=True)
    more_figures = [figure for section in sections for figure in section.figures]
    more_figures += [paper_sizes.figure] if paper_sizes else []
    more_figures += scaling_study.figures if scaling_study else ()
    for figure in (lead_figure, *rendered_figures, *more_figures):
        (reports / "figures" / f"{figure.name}.png").write_bytes(figure.png)
        (reports / "figures" / f"{figure.name}.csv").write_text(figure.csv, encoding="utf-8")
    for result in results:
        card_path(result, reports).write_text(render_run_card(result, experiment, outputs), encoding="utf-8")
    content = {
        "title": f"flopeq: {experiment.tracking.experiment}",
        "lead": [*lead_sentences(results, measurements), *symmetry_notes(experiment)],
        "lead_figure": lead_figure,
        "paper_sizes": paper_sizes,
        "table": table,
        "links": {result.run: run_links(result, reports, outputs, run_urls) for result in results},
        "runs": runs_url and Link("runs in MLflow", runs_url, f"all side by side{_local_ui_hint(runs_url)}"),
        "summary": summarize_runs(results),
        "notes": measurement_notes(experiment, results),
        "figures": rendered_figures,
        "sweeps": sections,
        "scaling": scaling_study,
    }
    page = reports / "index.html"
    page.write_text(render_template("report.html", **content), encoding="utf-8")
    (reports / "report.md").write_text(render_template("report.md", **content), encoding="utf-8")
    numbers = {result.run: result.all_metrics() for result in results}
    (reports / "metrics.json").write_text(json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    return table, page


def card_path(result: RunResult, reports: Path = Path("reports")) -> Path:
    """Returns the path of a run's card."""
    return reports / "cards" / f"{result.run}.md"


def render_run_card(result: RunResult, experiment: Experiment, outputs: Path = Path("outputs")) -> str:
    """Renders the model card of a run."""
    side = experiment.data.image_size
    config = experiment.resolved(result.run)
    return render_card(
        result.model,
        config["args"],
        (3, side, side),
        result.all_metrics(),
        weights=f"those of `{experiment.trained_name(result.run)}`'s `weights.safetensors`"
        if result.run in experiment.symmetrized
        else "those of `weights.safetensors`",
        conditions=result.throughput_conditions,
        run=TrainedRun(config, result.metrics, result.run_info, result.failure),
        run_folder=outputs / result.run,
    )


def run_links(result: RunResult, reports: Path, outputs: Path, run_urls: Mapping[str, str]) -> list[Link]:
    """Returns links to a run's card, configuration and weights, if they exist, and to its MLflow run."""
    folder = outputs / result.run
    paths = {
        "card": card_path(result, reports),
        "config": folder / "config.yaml",
        "weights": folder / "weights.safetensors",
    }
    found = [Link(name, os.path.relpath(path, reports)) for name, path in paths.items() if path.is_file()]
    if url := run_urls.get(result.mlflow_run_id or ""):
        found.append(Link("MLflow", url, f"run {result.mlflow_run_id}{_local_ui_hint(url)}"))
    return found


def _local_ui_hint(url: str) -> str:
    return "; on this machine, after `make ui`" if url.startswith("http://127.0.0.1") else ""


def symmetry_notes(experiment: Experiment) -> list[str]:
    """Returns a sentence for each symmetry that the networks have and the data have not, on what to expect."""
    data, notes = experiment.data, []
    if not data.flop_invariant:
        notes.append(
            f"A control with the wrong symmetry: the labels of {data.name} change under mirroring, but E(X) cannot "
            "tell an image from its mirror image. E(X) is therefore expected to fall behind X here."
        )
    larger = [name for name, run in experiment.models.items() if _has_larger_group(run.model)]
    if data.has_up and larger:
        notes.append(
            f"The images of {data.name} have an up. Networks for larger groups than the flop's ({', '.join(larger)}) "
            "cannot tell it from down, and are therefore expected to fall behind E(X) here."
        )
    return notes


def _has_larger_group(model: str) -> bool:
    """Whether the model is equivariant to more than the flop."""
    info = describe(model)
    return info is not None and info.group not in (None, C2.name)


def interval_note() -> str:
    """Returns a note on the methods of all intervals."""
    return (
        "Intervals: 95%. Top-1 of one seed: Wilson's score interval over the validation images. Top-1 of several "
        f"seeds, and all differences: percentile bootstrap of {NUM_DRAWS:,} draws over the images, which both sides of "
        "a difference share, and over the seeds where there are several. McNemar's p: exact test over the images that "
        "only one of two networks gets right, for one seed of each. Better and worse: the interval of the difference "
        "excludes zero; otherwise the two cannot be told apart. Small figures under a top-1 or a difference are its "
        "interval; elsewhere they are the lowest and the highest seed. The intervals are computed by scipy "
        f"{version('scipy')} and numpy {version('numpy')}."
    )


def measurement_notes(experiment: Experiment, results: Sequence[RunResult]) -> list[str]:
    """Returns notes on how the numbers were measured."""
    train, data = experiment.train, experiment.data
    settings = {result.throughput_conditions for result in results if result.throughput}
    workers = f"{train.most_workers} worker{'s' if train.most_workers > 1 else ''}"
    notes = [
        f"Data: {data.name}, images of {data.image_size} × {data.image_size} pixels. Training: {workers} of "
        f"{train.cpus_per_worker} CPU core{'s' if train.cpus_per_worker > 1 else ''}, "
        f"mixed precision {train.amp or 'off'}, "
        f"{_describe_compilation(experiment, results)}; the weights are those of the epoch with the best top-1.",
        "FLOPs: one image's forward pass in the paper's convention, in which a multiply-add counts 1 and "
        "element-wise operations count too; MACs count multiply-adds only.",
        "Flop agreement: validation images with the same top-1 class as their mirror image. Equivariance error: "
        "the largest relative change of the logits under mirroring, and of networks for larger groups also under the "
        "other symmetries of their group, on the first batch of images.",
        f"Throughput: forward passes without gradients, {'; '.join(sorted(settings)) or 'not measured'}; the "
        f"median of {experiment.throughput.runs} passes after {experiment.throughput.warmup} warm-up passes, "
        "alternating between the models. Small figures below are the quartiles of the passes.",
        "Throughput ratio: a network over its X, the median of the ratios of neighbouring passes, with their "
        "quartiles. FLOP ratio: X over the network. Share: the first over the second, the fraction of the saved FLOPs "
        "that becomes speed.",
        f"Versions: {', '.join(f'{name} {version(name)}' for name in ('torch', 'timm'))}.",
    ]
    if waits := {r.run: r.data_wait_pct for r in results if (r.data_wait_pct or 0) >= INPUT_BOUND_PCT}:
        shares = ", ".join(f"{run} {share:.0f}%" for run, share in waits.items())
        notes.append(
            f"Bound by their input: these trainings waited for images for a part of their time ({shares}). How fast "
            "they trained says little about their networks. Throughput here is measured without loading."
        )
    if symmetrized := experiment.symmetrized.values():
        kinds = dict.fromkeys(f"group {run.group}, {run.how}" for run in symmetrized)
        notes.append(
            "S(X): X's own weights, without training. The network runs once for each symmetry of a group (canonical: "
            "once in all), so that its logits are the same for an image and its transformed images: "
            f"{'; '.join(kinds)}."
        )
    if any(result.top1_interval for result in results):
        notes.append(interval_note())
    if has_metric(results, "val/ema_top1_pct"):
        notes.append(
            "EMA: the moving average of the weights, at its own best epoch; all other numbers are of the plain weights."
        )
    if has_metric(results, "val/real_top1_pct"):
        notes.append("ReaL: ImageNet's reassessed labels (Beyer et al. 2020), an image may have several.")
    if sets := further_set_names(results):
        notes.append(f"Further validation, not used for training or model selection: {', '.join(sets)}.")
    if any(result.paper for result in results):
        notes.append(
            "The paper's columns (Bökman et al. 2025, Table 1): ImageNet-1K; one A100-40GB, batch 64, "
            "compiled, mixed precision."
        )
    return notes


def _describe_compilation(experiment: Experiment, results: Sequence[RunResult]) -> str:
    """Returns whether the trainings were compiled, which a machine without a compiler cannot do."""
    asked = experiment.train.compile
    eager = [result.run for result in results if result.run_info and not result.run_info.get("compiled", asked)]
    if not asked or (eager and len(eager) == len(results)):
        return "eager"
    return f"compiled, except {', '.join(eager)}, whose machine lacked a compiler" if eager else "compiled"


def render_template(template: str, **content: Any) -> str:
    """Renders a template from templates/, with HTML escaping for .html."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=template.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**content)
