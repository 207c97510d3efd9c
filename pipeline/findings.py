"""What the sweeps found, in words and tables: from the files that they left, and as far as the seeds allow it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import pareto, sweep_figures
from pipeline.files import read_json
from pipeline.pictures import Picture
from pipeline.table import NOTHING, Cell, Row, Table


@dataclass(frozen=True)
class Section:
    """A sweep in the report."""

    title: str
    sentences: tuple[str, ...]
    table: Table
    pictures: tuple[Picture, ...]


def sections(sweeps: Path = Path("sweeps")) -> list[Section]:
    """A section for each sweep that has swept anything."""
    found = []
    if recipe := read_json(sweeps / "recipe/findings.json", {}):
        found.append(_recipe(recipe, tuple(sweep_figures.recipe(sweeps / "recipe"))))
    if (hybrid := read_json(sweeps / "hybrid/findings.json", {})).get("splits"):
        found.append(_hybrid(hybrid, tuple(sweep_figures.hybrid(sweeps / "hybrid"))))
    return found


def _recipe(findings: Mapping[str, Any], pictures: tuple[Picture, ...]) -> Section:
    fields = list(dict.fromkeys(field for found in findings.values() for field in found["own"]["params"]))
    rows = []
    for run, found in findings.items():
        states = ", ".join(f"{count} {state}" for state, count in found["states"].items() if count)
        for side, word in (("own", "own recipe"), ("best", "best found")):
            if found[side] is None:
                continue
            told = [value for value in found["confirmed"]["start" if side == "own" else "best"] if value is not None]
            rows.append((
                f"{run}, {word}", _top1(found[side]["top1_pct"]), spread(told) if told else NOTHING,
                *(_value(found[side]["params"].get(field)) for field in fields), states if side == "own" else "",
            ))
    columns = ("run", "top-1, search", "top-1, further seeds", *fields, "trials")
    sentences = tuple(f"{run}: {tuned(found)}." for run, found in findings.items())
    return Section("Recipe sweep", sentences, _table(columns, rows), pictures)


def _hybrid(findings: Mapping[str, Any], pictures: tuple[Picture, ...]) -> Section:
    rows = tuple(
        (
            f"{row['run']}, k = {row['k']}", _top1(row["top1_pct"]), spread(row["top1"]) if row["top1"] else NOTHING,
            f"{row['params']:,}", f"{row['flops']:,}", f"{row['flop_fraction']:.2f}", f"{row['img_per_s']:,.0f}",
            "yes" if row["on_front"] else "no",
        )
        for row in findings["splits"]
    )
    columns = ("run, equivariant blocks", "top-1, mean", "top-1, range", "params", "FLOPs", "of X's FLOPs", "images/s",
               "Pareto front")
    sentences = tuple(f"{run}: {split(found)}." for run, found in findings["runs"].items())
    return Section("Split sweep", sentences, _table(columns, rows), pictures)


def _table(columns: tuple[str, ...], rows: Sequence[Sequence[str]]) -> Table:
    """Cells are sorted by the number that they begin with; the first by its words. They begin with their run's name."""
    cells = [(Cell(first, first), *(Cell(text, _order(text)) for text in rest)) for first, *rest in rows]
    return Table((), columns, tuple(Row(row[0].text.partition(",")[0], row) for row in cells), num_text_columns=1)


def _order(text: str) -> float | str | None:
    number = re.match(r"[-+\d.,e]+", text)
    try:
        return float(number[0].replace(",", "")) if number else None if text in ("", NOTHING) else text
    except ValueError:
        return text


def tuned(finding: Mapping[str, Any]) -> str:
    """A run's finding as a sentence, which also says when it is none."""
    best, own = finding["best"], finding["own"]
    if best is None:
        return "no trial was trained to its end"
    if best["is_own"]:
        return f"nothing better than its own recipe, at top-1 {best['top1_pct']:.1f}%"
    search = f"top-1 {best['top1_pct']:.1f}%" + (
        "" if own["top1_pct"] is None else f" against {own['top1_pct']:.1f}% for its own recipe"
    )
    confirmed = finding["confirmed"]
    pairs = [[value for value in confirmed[side] if value is not None] for side in ("best", "start")]
    if not all(pairs):
        return f"{search}, not confirmed under further seeds"
    ranges = [spread(values) for values in pairs]
    seeds = f"under {len(confirmed['seeds'])} further seed{'s' if len(confirmed['seeds']) > 1 else ''}"
    verdict = (
        "a gain beyond the spread over seeds" if finding["beyond_spread"]
        else "worse" if pareto.beyond_spread(pairs[1], pairs[0])
        else "nothing beyond the spread over seeds"
    )
    return f"{search} in the search; {seeds} {ranges[0]} against {ranges[1]}: {verdict}"


def spread(values: Sequence[float]) -> str:
    """The range of some top-1 in words."""
    low, high = min(values), max(values)
    return f"{low:.1f}%" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}%"


def split(found: Mapping[str, Any]) -> str:
    """A family's finding as a sentence."""
    best = found["best"]
    if best is None:
        return f"no split within {found['flop_budget']:.0%} of X's FLOPs was trained to its end"
    what = (f"within {found['flop_budget']:.0%} of X's FLOPs the best split is k = {best['k']}, at top-1 "
            f"{spread(best['top1'])} and {best['flop_fraction']:.0%} of the FLOPs")
    alike = f"; not told apart from k = {', '.join(map(str, found['alike']))} by the spread over seeds" * bool(
        found["alike"])
    above = f"; beyond the spread, k = {', '.join(map(str, found['above']))} reach more for more FLOPs" * bool(
        found["above"])
    return what + alike + above


def _top1(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f}%"


def _value(value: Any) -> str:
    return "default" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
