"""A figure as the report has it: SVG whose marks answer a pointer or a keyboard, PNG, and its data as CSV.

A mark is anything that belongs to a run. `mark(run, words)` is the `gid` that a matplotlib artist gets; `picture` makes
of it an SVG group with the class `mark`, the run in `data-run` and the words as its title, which browsers show without
any script. `page.js` does so better.
"""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.edgecolor": "#777777",
    "axes.labelcolor": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "svg.hashsalt": "flopeq",
}
_MARK = re.compile(r'<g id="mark\|([^|"]*)\|([^"]*)">')
_ID = re.compile(r'\b(id="|href="#|url\(#)')


@dataclass(frozen=True)
class Picture:
    """One figure, drawn, with a sentence that says what is seen."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: str
    """An element to stand in a page, its ids no other picture's."""
    csv: str
    """What is drawn, under the names of metrics.json."""


def mark(run: str, words: str) -> str:
    """The `gid` of an artist that belongs to a run, and what is said of it."""
    return f"mark|{run}|{words}"


def picture(name: str, title: str, caption: str, figure: Figure, rows: Sequence[Mapping[str, Any]]) -> Picture:
    """The figure in all its forms; `rows` are its data, whose columns may differ."""
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=160)
    figure.set_layout_engine("none")  # what it found stands, and finding it takes half of the time
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(name, title, caption, png.getvalue(), _element(svg.getvalue(), name, title), table(rows))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV, with the columns of all of them; nothing for None."""
    columns = dict.fromkeys(column for row in rows for column in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _element(svg: str, name: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
                 rf'<svg viewBox="\1" role="group" aria-label="{html.escape(title)}">', svg, count=1)
    svg = _MARK.sub(r'<g class="mark" data-run="\1"><title>\2</title>', svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    return _ID.sub(rf"\g<1>{name}-", svg)
