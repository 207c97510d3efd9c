"""The results of `symmetrization.py` as tables in Markdown, made from its CSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.robustness import GROUPS, NETWORKS

Row = Mapping[str, str]


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a CSV file; none if it does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def render_tables(folder: Path) -> str:
    """Returns all tables that the folder's CSV files allow."""
    parts = [
        *_robustness_tables(read_rows(folder / "robustness.csv")),
        *_view_tables(read_rows(folder / "views.csv"), read_rows(folder / "view_costs.csv")),
    ]
    return "\n\n".join(parts) + "\n"


def format_difference(row: Row, name: str) -> str:
    """A difference in points with its interval, or a dash."""
    if not row[f"{name}_pct"]:
        return "–"
    value, low, high = (float(row[f"{name}_{part}pct"]) for part in ("", "low_", "high_"))
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


def format_top1(row: Row) -> str:
    """A top-1 with its interval, in percent."""
    return f"{float(row['top1_pct']):.1f} ({float(row['top1_low_pct']):.1f}–{float(row['top1_high_pct']):.1f})"


def _robustness_tables(rows: list[Row]) -> Iterator[str]:
    if not rows:
        return
    found = {(row["family"], row["network"], row["transformation"]): row for row in rows}
    families = list(dict.fromkeys(row["family"] for row in rows))
    transformed = [kind for kind in GROUPS if kind != "none"]
    yield _table(
        ["run", "network", *(f"top-1 %, {kind}" for kind in GROUPS)],
        [
            [family, network, *(_cell(found.get((family, network, kind))) for kind in GROUPS)]
            for family in families
            for network in NETWORKS
        ],
    )
    # E(X) is built for flops only: its differences under the others are in the CSV file.
    yield _table(
        ["run", "network", *(f"minus X, {kind}" for kind in transformed), "E(X) minus it, flops"],
        [
            [
                family,
                network,
                *(format_difference(found[family, network, kind], "minus_x") for kind in transformed),
                format_difference(found[family, network, "flops"], "e_minus"),
            ]
            for family in families
            for network in NETWORKS
            if network.startswith("S")
        ],
    )


def _cell(row: Row | None) -> str:
    return "–" if row is None else format_top1(row)


def _view_tables(rows: list[Row], costs: list[Row]) -> Iterator[str]:
    if rows:
        yield _table(
            ["images", "design", "tuples", "top-1 %", "minus plain", "minus full product", "same answer %"],
            [
                [
                    row["num_images"],
                    row["design"],
                    row["num_tuples"],
                    format_top1(row),
                    format_difference(row, "minus_plain"),
                    format_difference(row, "minus_full"),
                    f"{float(row['same_answer_pct']):.1f}",
                ]
                for row in rows
            ],
        )
    if costs:
        yield _table(
            ["images", "design", "encoder passes", "MFLOPs", "ms a tuple (quartiles)", "time over efficient"],
            [
                [
                    row["num_images"],
                    row["design"],
                    row["encoder_passes"],
                    f"{float(row['mflops']):,.1f}",
                    f"{float(row['ms_per_tuple']):.2f} ({float(row['ms_low']):.2f}–{float(row['ms_high']):.2f})",
                    f"{float(row['time_over_efficient']):.2f}",
                ]
                for row in costs
            ],
        )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
