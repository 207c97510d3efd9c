"""Output of the command line: tables, JSON and progress bars."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Shows a progress bar on stderr if that is a terminal, and removes it at the end.

    Yields a function to call with a description, the number of steps done, and their total.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # The bar is drawn on updates only: a refresh thread would run during the measurements and disturb them.
    with Progress(
        *columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda label, done, total: bar.update(task, description=label, completed=done, total=total, refresh=True)


def print_line(line: str) -> None:
    _console().print(line, highlight=False, soft_wrap=True)


def _console() -> Console:
    """A console as wide as the terminal; off a terminal, wide enough for every table."""
    return Console(width=None if sys.stdout.isatty() else 180)


def print_rows(rows: list[dict[str, Any]], as_json: bool, units: dict[str, tuple[float, str]] | None = None) -> None:
    """Prints rows as JSON, or as a table. `units` maps a column to its divisor and heading."""
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    units = units or {}
    table = Table(box=box.SIMPLE_HEAD)
    for index, key in enumerate(rows[0]):
        is_text = index == 0 or any(isinstance(row[key], str) and not _is_number(row[key]) for row in rows)
        table.add_column(units.get(key, (1, key))[1].strip(), justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(format_cell(value, units.get(key, (1, key))[0]) for key, value in row.items()))
    _console().print(table)


def _is_number(text: str) -> bool:
    return text == "-" or text.replace(",", "").replace(".", "", 1).isdigit()


def format_cell(value: Any, divisor: float = 1) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    value = value / divisor
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def format_fixed(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
