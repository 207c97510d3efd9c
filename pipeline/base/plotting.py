"""Figures of the report: an interactive SVG, a PNG, and the plotted data as CSV.

A mark is any matplotlib artist that belongs to a run. Give the artist the `gid` that `mark_gid(run, tooltip)` returns.
`render_figure` turns it into an SVG group with the class `mark`, the run in `data-run` and the tooltip as its title.
Browsers show the title without a script; `page.js` replaces it by a styled tooltip.
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

MATPLOTLIB_STYLE: dict[Any, Any] = {
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
class RenderedFigure:
    """A rendered figure with its title and caption."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: str
    """The `<svg>` elements for the page. Their ids start with the name of the figure, so that they are unique."""
    csv: str
    """The plotted data, with the column names of metrics.json."""


def mark_gid(run: str, tooltip: str) -> str:
    """Returns the `gid` for an artist that belongs to a run."""
    return f"mark|{run}|{tooltip}"


def render_figure(
    name: str,
    title: str,
    caption: str,
    figure: Figure,
    rows: Sequence[Mapping[str, Any]],
    panels: Sequence[Figure] = (),
) -> RenderedFigure:
    """Renders a figure in all formats.

    Args:
        rows: the plotted data; their columns may differ.
        panels: the parts of the figure as figures of their own. The page shows them instead of the figure, one below
            the other where it is too narrow.
    """
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=160)
    if not panels:
        figure.set_layout_engine("none")  # keeps the layout of the first save; computing it takes half of the time
        svg = _render_svg(figure, name, title)
    else:
        parts = [_render_svg(panel, f"{name}-{number}", title) for number, panel in enumerate(panels)]
        svg = "\n".join(parts)
    return RenderedFigure(name, title, caption, png.getvalue(), svg, rows_to_csv(rows))


def rows_to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats rows as CSV with the union of their columns. None becomes an empty cell."""
    columns = dict.fromkeys(column for row in rows for column in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _render_svg(figure: Figure, name: str, title: str) -> str:
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return _svg_element(svg.getvalue(), name, title)


def _svg_element(svg: str, name: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        rf'<svg viewBox="\1" role="group" aria-label="{html.escape(title)}">',
        svg,
        count=1,
    )
    svg = _MARK.sub(r'<g class="mark" data-run="\1"><title>\2</title>', svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    return _ID.sub(rf"\g<1>{name}-", svg)
