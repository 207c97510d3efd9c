"""The report as files: a page, Markdown, figures and their data, numbers, and a card for every model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

from flopeq.card import TrainedRun, card
from pipeline import figures, findings
from pipeline.config import Experiment
from pipeline.render import render
from pipeline.report import Result
from pipeline.table import Table, any_has, flop_unit, further, param_unit, summarize, tabulate


@dataclass(frozen=True)
class Link:
    """From a row to something of its run."""

    text: str
    url: str
    hint: str = ""


def write(
    experiment: Experiment,
    results: Sequence[Result],
    reports: Path = Path("reports"),
    sweeps: Path = Path("sweeps"),
    outputs: Path = Path("outputs"),
    runs_url: str | None = None,
    run_urls: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Table, Path]:
    """Writes everything into `reports`. Returns the table and the page's path.

    Args:
        runs_url: where MLflow shows the runs.
        run_urls: and each of them, by its id there.
    """
    table = tabulate(results)
    pictures = figures.draw(results, flop_unit(results), param_unit(results))
    sections = findings.sections(sweeps)
    for folder in ("figures", "cards"):
        (reports / folder).mkdir(parents=True, exist_ok=True)
    for picture in (*pictures, *(picture for section in sections for picture in section.pictures)):
        (reports / "figures" / f"{picture.name}.png").write_bytes(picture.png)
        (reports / "figures" / f"{picture.name}.csv").write_text(picture.csv, encoding="utf-8")
    for result in results:
        card_of(result, reports).write_text(card_text(result, experiment, outputs), encoding="utf-8")
    content = {
        "title": f"flopeq: {experiment.tracking.experiment}",
        "table": table,
        "links": {result.run: links(result, reports, outputs, run_urls) for result in results},
        "runs": runs_url and Link("runs in MLflow", runs_url, f"all side by side{_hint(runs_url)}"),
        "summary": summarize(results),
        "notes": measured_how(experiment, results),
        "pictures": pictures,
        "sweeps": sections,
    }
    page = reports / "index.html"
    page.write_text(render("report.html", **content), encoding="utf-8")
    (reports / "report.md").write_text(render("report.md", **content), encoding="utf-8")
    numbers = {result.run: result.numbers() for result in results}
    (reports / "metrics.json").write_text(json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    return table, page


def card_of(result: Result, reports: Path = Path("reports")) -> Path:
    """Where a run's card lies."""
    return reports / "cards" / f"{result.run}.md"


def card_text(result: Result, experiment: Experiment, outputs: Path = Path("outputs")) -> str:
    """A run's card, of the experiment as it stands."""
    side = experiment.data.image_size
    config = experiment.resolved(result.run)
    return card(
        result.model,
        config["args"],
        (3, side, side),
        result.numbers(),
        weights="those of `weights.safetensors`",
        conditions=result.conditions,
        run=TrainedRun(config, result.measured, result.note, result.failure),
        to_export=outputs / result.run,
    )


def links(result: Result, reports: Path, outputs: Path, run_urls: Mapping[str, str]) -> list[Link]:
    """A run's card, configuration and weights, as far as they are there, and its MLflow run."""
    folder = outputs / result.run
    places = {"card": card_of(result, reports), "config": folder / "config.yaml",
              "weights": folder / "weights.safetensors"}
    found = [Link(name, os.path.relpath(place, reports)) for name, place in places.items() if place.is_file()]
    if url := run_urls.get(result.mlflow_run_id or ""):
        found.append(Link("MLflow", url, f"run {result.mlflow_run_id}{_hint(url)}"))
    return found


def _hint(url: str) -> str:
    return "; on this machine, after `make ui`" if url.startswith("http://127.0.0.1") else ""


def measured_how(experiment: Experiment, results: Sequence[Result]) -> list[str]:
    """Where the numbers come from and under what conditions they hold."""
    train, data = experiment.train, experiment.data
    settings = {result.conditions for result in results if result.speed}
    workers = f"{train.most_workers} worker{'s' if train.most_workers > 1 else ''}"
    notes = [
        f"Data: {data.name}, images of {data.image_size} × {data.image_size} pixels. Training: {workers} of "
        f"{train.cpus_per_worker} CPU core{'s' if train.cpus_per_worker > 1 else ''}, mixed precision {train.amp}, "
        f"{'compiled' if train.compile else 'eager'}; the weights are of the epoch with the best top-1.",
        "FLOPs: one image's forward pass in the paper's convention, in which a multiply-add counts 1 and "
        "element-wise operations count too; MACs are the multiply-adds alone.",
        "Flop agreement: validation images whose mirror image gets the same top-1 class. Equivariance error: "
        "the largest relative change of the logits under mirroring.",
        f"Throughput: forward passes without gradients, {'; '.join(sorted(settings)) or 'not measured'}; the "
        f"median of {experiment.throughput.runs} passes after {experiment.throughput.warmup} to warm up, all "
        "models taking turns.",
        "Throughput ratio: E or H over X. FLOP ratio: X over E or H. Share: the first over the second, the "
        "part of the saved work that arrives as speed.",
        f"Versions: {', '.join(f'{name} {version(name)}' for name in ('torch', 'timm'))}.",
    ]
    if any_has(results, "val/ema_top1_pct"):
        notes.append("EMA: the moving average of the weights, at its own best epoch; all else is of the plain weights.")
    if any_has(results, "val/real_top1_pct"):
        notes.append("ReaL: ImageNet's reassessed labels (Beyer et al. 2020), of which an image may have several.")
    if sets := further(results):
        notes.append(f"Further validation, never trained or chosen on: {', '.join(sets)}.")
    if any(result.paper for result in results):
        notes.append(
            "The paper's columns (Bökman et al. 2025, Table 1): ImageNet-1K; one A100-40GB, batch 64, "
            "compiled, mixed precision."
        )
    return notes
