"""The report's sections on the sweeps: findings, tables and figures, from the files of the sweeps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.base.files import read_json
from pipeline.base.plotting import RenderedFigure
from pipeline.reporting.table import MISSING, Cell, Row, Table
from pipeline.sweeps import figures
from pipeline.sweeps.analysis import describe_recipe_finding, describe_split_finding, format_splits, format_top1_range


@dataclass(frozen=True)
class SweepSection:
    """A sweep in the report."""

    title: str
    sentences: tuple[str, ...]
    table: Table
    figures: tuple[RenderedFigure, ...]


def load_sections(sweeps: Path = Path("sweeps")) -> list[SweepSection]:
    """Returns a section for each sweep with results."""
    found = []
    if recipe := read_json(sweeps / "recipe/findings.json", {}):
        found.append(_recipe_section(recipe, tuple(figures.draw_recipe_sweep(sweeps / "recipe"))))
    if (hybrid := read_json(sweeps / "hybrid/findings.json", {})).get("splits"):
        found.append(_split_section(hybrid, tuple(figures.draw_hybrid_sweep(sweeps / "hybrid"))))
    return found


def _recipe_section(findings: Mapping[str, Any], rendered_figures: tuple[RenderedFigure, ...]) -> SweepSection:
    fields = list(dict.fromkeys(field for found in findings.values() for field in found["own"]["params"]))
    rows = []
    for run, found in findings.items():
        states = ", ".join(f"{count} {state}" for state, count in found["states"].items() if count)
        for side, word in (("own", "own recipe"), ("best", "best of the search")):
            if found[side] is None or found[side].get("is_own"):
                continue
            full_top1 = [value for value in found["confirmed"][side] if value is not None]
            is_used = found["is_confirmed"] == (side == "best")
            rows.append(
                (
                    f"{run}, {word}",
                    _format_top1(found[side]["top1_pct"]),
                    format_top1_range(full_top1) if full_top1 else MISSING,
                    "yes" if is_used else "no",
                    *(_format_value(found[side]["params"].get(field)) for field in fields),
                    states if side == "own" else "",
                )
            )
    columns = ("run", "top-1, search", "top-1, new seeds, all epochs", "handed on", *fields, "trials")
    sentences = tuple(f"{run}: {describe_recipe_finding(found)}." for run, found in findings.items())
    return SweepSection("Recipe sweep", sentences, _table(columns, rows), rendered_figures)


def _split_section(findings: Mapping[str, Any], rendered_figures: tuple[RenderedFigure, ...]) -> SweepSection:
    rows = tuple(
        (
            f"{row['run']}, {format_splits([row['k']])}",
            _format_top1(row["top1_pct"]),
            format_top1_range(row["top1"]) if row["top1"] else MISSING,
            f"{row['params']:,}",
            f"{row['flops']:,}",
            f"{row['flop_fraction']:.2f}",
            "–" if row["img_per_s"] is None else f"{row['img_per_s']:,.0f}",
            "yes" if row["on_front"] else "no",
        )
        for row in findings["splits"]
    )
    columns = (
        "run, equivariant blocks or groups",
        "top-1, mean",
        "top-1, range",
        "params",
        "FLOPs",
        "of X's FLOPs",
        "images/s",
        "Pareto front",
    )
    sentences = tuple(f"{run}: {describe_split_finding(found)}." for run, found in findings["runs"].items())
    return SweepSection("Split sweep", sentences, _table(columns, rows), rendered_figures)


def _table(columns: tuple[str, ...], rows: Sequence[Sequence[str]]) -> Table:
    """Builds a table. Cells sort by their leading number, those of the first column by text: the run and more."""
    cells = [(Cell(first, first), *(Cell(text, _sort_key(text)) for text in rest)) for first, *rest in rows]
    return Table((), columns, tuple(Row(row[0].text.partition(",")[0], row) for row in cells), num_text_columns=1)


def _sort_key(text: str) -> float | str | None:
    number = re.match(r"[-+\d.,e]+", text)
    try:
        return float(number[0].replace(",", "")) if number else None if text in ("", MISSING) else text
    except ValueError:
        return text


def _format_top1(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}%"


def _format_value(value: Any) -> str:
    return "default" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
