"""Stage `report`: writes the comparison of all runs to reports/. `make repro` prints it at the end."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

from stages import load_experiment, run_stage

if TYPE_CHECKING:
    from pipeline.reporting.table import Table


THROUGHPUT_HINT = "`dvc repro --single-item throughput` measures the throughput of all models in params.yaml"

_PADDING = 2  # rich's padding of a cell


def run() -> None:
    from pipeline import track
    from pipeline.reporting import page, run_results

    experiment = load_experiment(uses_ray=False)
    results = run_results.load_results(experiment)
    runs_url, run_urls = track.ui_urls(experiment, [r.mlflow_run_id for r in results if r.mlflow_run_id])
    page.write_report(experiment, results, runs_url=runs_url, run_urls=run_urls)
    for result in results:
        if result.mlflow_run_id in run_urls:
            track.publish_report(result.mlflow_run_id, page.card_path(result), result.all_metrics())
    logging.info("the comparison is in reports/index.html")


def print_report(run_names: Collection[str] = ()) -> None:
    """Prints the comparison of all runs and the path of the page; or only the comparison of the given runs.

    If one of the given runs has no throughput, the last line says how to measure it. The table is split into parts that
    fit the terminal's width.
    """
    from pathlib import Path

    import rich.box
    from rich.console import Console
    from rich.table import Table as Grid

    from pipeline.base import config
    from pipeline.reporting import run_results
    from pipeline.reporting import table as tables

    results = run_results.load_results(config.load_experiment())
    shown = [result for result in results if not run_names or result.run in run_names]
    table, console = tables.build_table(shown), Console()
    for part in _split_columns(table, console.width):
        grid = Grid(box=rich.box.SIMPLE_HEAD, padding=(0, 1))
        for number in part:
            words = number < table.num_text_columns
            grid.add_column(table.columns[number], justify="left" if words else "right", vertical="bottom")
        for row in table.texts:
            grid.add_row(*(row[number] for number in part))
        console.print(grid)
    for footnote in table.footnotes:
        console.print(footnote)
    if not run_names:
        console.print(f"report: {Path('reports/index.html').resolve()}", soft_wrap=True, highlight=False)
    elif any(result.img_per_s is None for result in shown):
        console.print(THROUGHPUT_HINT, soft_wrap=True, highlight=False)


def _split_columns(table: Table, width: int) -> list[list[int]]:
    """The columns in groups no wider than `width`, each headed by the run's name."""
    widths = [
        _PADDING + max(len(word) for word in [*heading.split(), *(row[number] for row in table.texts)])
        for number, heading in enumerate(table.columns)
    ]
    parts, start = [[0]], 1
    for _, span in table.groups:
        group = list(range(max(start, 1), start + span - (start == 1)))
        if sum(widths[number] for number in [*parts[-1], *group]) > width - _PADDING and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1] += group
        start = group[-1] + 1
    return parts


if __name__ == "__main__":
    run_stage(run)
