"""The report's section on the paper's S sizes: sentences, table and figure of the measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.base.plotting import RenderedFigure
from pipeline.reporting.paper_sizes import Measurement
from pipeline.reporting.paper_sizes_figure import draw_paper_sizes, mark_name
from pipeline.reporting.table import Cell, Row, Table, fixed_point, format_range, significant_digits

_TWO_DIGITS = fixed_point(2)


@dataclass(frozen=True)
class PaperSizesSection:
    title: str
    sentences: tuple[str, ...]
    table: Table
    figure: RenderedFigure


def make_section(measurements: Sequence[Measurement]) -> PaperSizesSection | None:
    """Returns the section; None without measurements."""
    if not measurements:
        return None
    here = " on this machine" * any(measurement.is_this_machine for measurement in measurements)
    return PaperSizesSection(
        f"At the paper's sizes{here}",
        tuple(_describe(measurement) for measurement in measurements),
        _make_table(measurements),
        draw_paper_sizes(measurements),
    )


def _describe(measurement: Measurement) -> str:
    ratios = _format_span([pair.ratio.median for pair in measurement.comparisons])
    fractions = _format_span([1 / pair.flop_ratio for pair in measurement.comparisons])
    name = measurement.name[0].upper() + measurement.name[1:]
    return (
        f"{name}: E(X) processes {ratios} times as many images per second as X, with {fractions} of the FLOPs "
        f"({measurement.conditions})."
    )


def _format_span(values: Sequence[float]) -> str:
    """Formats the lowest and the highest value, once if they are equal."""
    return " to ".join(dict.fromkeys(_TWO_DIGITS(value) for value in (min(values), max(values))))


def _make_table(measurements: Sequence[Measurement]) -> Table:
    rows = []
    for measurement in measurements:
        for pair in measurement.comparisons:
            low, median, high = pair.ratio
            cells = (
                Cell(pair.x_name, pair.x_name),
                Cell(measurement.short_name, measurement.short_name),
                Cell(significant_digits(pair.x_img_per_s), pair.x_img_per_s),
                Cell(significant_digits(pair.e_img_per_s), pair.e_img_per_s),
                Cell(_TWO_DIGITS(median), median, format_range(low, high, _TWO_DIGITS)),
                Cell(_TWO_DIGITS(pair.flop_ratio), pair.flop_ratio),
                Cell(f"{100 * pair.share:.0f}", pair.share),
            )
            rows.append(Row(mark_name(measurement, pair), cells))
    columns = ("X", "device", "X, images/s", "E(X), images/s", "throughput ratio", "FLOP ratio", "share %")
    return Table((), columns, tuple(rows), num_text_columns=2)
