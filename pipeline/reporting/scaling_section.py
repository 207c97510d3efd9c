"""The report's section on the scaling study: what was found, table, figures, and what is not identified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.base.files import read_json
from pipeline.base.plotting import RenderedFigure
from pipeline.reporting.table import Cell, Row, Table
from pipeline.scaling.figures import draw_figures


@dataclass(frozen=True)
class ScalingSection:
    """The study in the report."""

    title: str
    control: str
    """What is to be expected if the study is a control; else empty."""
    paragraph: str
    table: Table
    figures: tuple[RenderedFigure, ...]
    notes: tuple[str, ...]
    """What is left out, what is not identified and why, and the method."""


def load_section(folder: Path = Path("scaling")) -> ScalingSection | None:
    """Returns the section; None without a study."""
    findings, fits = read_json(folder / "findings.json", {}), read_json(folder / "fits.json", {})
    if not findings or not fits:
        return None
    return ScalingSection(
        findings["title"],
        findings["control"],
        findings["paragraph"],
        _make_table(findings["table"]),
        tuple(draw_figures(fits)),
        (*findings["left_out"], *findings["not_identified"], findings["method"]),
    )


def _make_table(table: Mapping[str, Any]) -> Table:
    rows = [tuple(Cell(cell["text"], cell["sort"], cell["spread"]) for cell in row) for row in table["rows"]]
    return Table(
        (),
        tuple(table["columns"]),
        tuple(Row(row[0].text, row) for row in rows),
        num_text_columns=1,
        footnotes=tuple(table["notes"]) if rows else (),
    )
