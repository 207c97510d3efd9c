"""Stage `report`: the comparison of all runs, written to reports/; `make repro` prints it at its end."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

from stages import main

if TYPE_CHECKING:
    from pipeline.table import Table

_PADDING = 2  # what rich puts around a cell


def run() -> None:
    from pipeline import config, page, report, track

    experiment = config.load()
    results = report.collect(experiment)
    runs_url, run_urls = track.urls(experiment, [r.mlflow_run_id for r in results if r.mlflow_run_id])
    page.write(experiment, results, runs_url=runs_url, run_urls=run_urls)
    for result in results:
        if result.mlflow_run_id in run_urls:
            track.present(result.mlflow_run_id, page.card_of(result), result.numbers())
    logging.info("the comparison is in reports/index.html")


def show(run_names: Collection[str] = ()) -> None:
    """Prints the comparison of all runs and where the page lies; or of those named, which the page need not have yet.

    The table comes in as many parts as the terminal's width asks for.
    """
    from pathlib import Path

    import rich.box
    from rich.console import Console
    from rich.table import Table as Grid

    from pipeline import config, report
    from pipeline import table as tables

    results = report.collect(config.load())
    table, console = tables.tabulate([r for r in results if not run_names or r.run in run_names]), Console()
    for part in _parts(table, console.width):
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


def _parts(table: Table, width: int) -> list[list[int]]:
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
    main(run)
