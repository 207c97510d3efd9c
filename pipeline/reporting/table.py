"""The comparison as a table: one row per run, and a mean row for runs that differ only in their seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flopeq.measure.paper import Table1Row
from pipeline.reporting.run_results import FURTHER_METRICS, RunResult, group_by_seed, seed_spread

MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """The text of a cell and its sort key. None sorts last."""

    text: str
    sort_key: float | str | None = None
    spread: str = ""
    """The lowest and the highest of several seeds."""

    def __str__(self) -> str:
        return f"{self.text} ({self.spread})" if self.spread else self.text


@dataclass(frozen=True)
class Row:
    """A run, or several seeds of it with their mean; `run` is the run, or the first of them."""

    run: str
    cells: tuple[Cell, ...]
    num_members: int = 0
    """How many of the rows that follow are its seeds."""


@dataclass(frozen=True)
class Table:
    """The comparison, ready to print."""

    groups: tuple[tuple[str, int], ...]
    """Group headings and the number of columns that each spans."""
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    num_text_columns: int
    """The first columns hold text, the others numbers."""
    footnotes: tuple[str, ...] = ()

    @property
    def texts(self) -> list[list[str]]:
        """The rows, as text only."""
        return [[str(cell) for cell in row.cells] for row in self.rows]

    @property
    def blocks(self) -> list[list[Row]]:
        """The rows that stay together when the table is sorted: seeds with their mean."""
        blocks, left = [], 0
        for row in self.rows:
            if left:
                blocks[-1].append(row)
                left -= 1
            else:
                blocks.append([row])
                left = row.num_members
        return blocks


Getter = Callable[[RunResult], float | str | None]

Formatter = Callable[[float], str]


def build_table(results: Sequence[RunResult]) -> Table:
    """Builds the comparison table, with the paper's columns if a run is a model of the paper."""
    groups = _column_groups(results)
    columns = [(heading, *column) for group in groups.values() for heading, column in group.items()]
    rows = []
    for members in group_by_seed(results):
        if len(members) > 1:
            cells = [_mean_cell(members, value, formatter) for _, value, formatter in columns]
            name = Cell(_group_label(members), members[0].group)
            rows.append(Row(members[0].group, (name, *cells[1:]), len(members)))
        rows += [Row(r.run, tuple(_make_cell(value(r), formatter) for _, value, formatter in columns)) for r in members]
    return Table(
        groups=tuple((name, len(group)) for name, group in groups.items()),
        columns=tuple(name for name, *_ in columns),
        rows=tuple(rows),
        num_text_columns=len(groups[""]),
        footnotes=tuple(f"† {r.run} did not converge: {r.failure}." for r in results if r.failure),
    )


def summarize_runs(results: Sequence[RunResult]) -> list[str]:
    """Returns a sentence for each E and H with a baseline X; several seeds share one sentence."""
    groups = {member.run: members for members in group_by_seed(results) for member in members}
    sentences = []
    for members in group_by_seed(results):
        flop_ratio = seed_spread(members, lambda r: r.flop_ratio)
        if flop_ratio is None or members[0].baseline is None:
            continue
        baseline_runs = groups[members[0].baseline]
        phrases = [f"{1 / flop_ratio.mean:.2f} of the FLOPs of {baseline_runs[0].group}"]
        if faster := seed_spread(members, lambda r: r.throughput_ratio):
            phrases.append(f"{faster.mean:.2f} times its throughput")
        both = [_format_top1(side) for side in (members, baseline_runs)]
        if all(both):
            phrases.append(f"top-1 {both[0]} against {both[1]}")
        label = members[0].label if len(members) == 1 else _group_label(members)
        sentences.append(f"{label}: {', '.join(phrases)}.")
    return sentences


def further_set_names(results: Sequence[RunResult]) -> list[str]:
    """Names of the further validation sets that some run was measured on."""
    names = (key.partition("/")[0] for result in results for key in result.metrics)
    return [name for name in dict.fromkeys(names) if name not in ("val", "equivariance")]


def has_metric(results: Sequence[RunResult], key: str) -> bool:
    """Whether any run has this metric in its metrics.json."""
    return any(key in result.metrics for result in results)


def flop_unit(results: Sequence[RunResult]) -> tuple[float, str]:
    """Returns the divisor and the name of the unit of FLOPs."""
    return (1e9, "GFLOPs") if any((r.flops or 0) >= 1e9 for r in results) else (1e6, "MFLOPs")


def param_unit(results: Sequence[RunResult]) -> tuple[float, str]:
    """Returns the divisor and the name of the unit of parameters."""
    return (1e6, "M") if any((r.params or 0) >= 1e6 for r in results) else (1e3, "k")


def fixed_point(digits: int) -> Formatter:
    """Returns a formatter with this many digits after the point."""
    return lambda value: f"{value:,.{digits}f}"


def significant_digits(value: float) -> str:
    """Formats three significant digits; the integer part is never rounded."""
    return f"{value:,.{max(0, min(3, 2 - math.floor(math.log10(value or 1))))}f}"


def format_error(value: float) -> str:
    """Formats a relative error, in scientific notation below 0.01."""
    return f"{value:.1e}" if value < 0.01 else f"{value:.2f}"


def _column_groups(results: Sequence[RunResult]) -> dict[str, dict[str, tuple[Getter, Formatter]]]:
    (per_flop, flops), (per_param, params) = flop_unit(results), param_unit(results)
    formatter = significant_digits  # never called for text columns

    def percent(key: str) -> tuple[Getter, Formatter]:
        return lambda r: r.metrics.get(key), fixed_point(1)

    groups: dict[str, dict[str, tuple[Getter, Formatter]]] = {
        "": {
            "run": (lambda r: r.label, formatter),
            "model": (lambda r: r.name, formatter),
            "variant": (lambda r: r.variant, formatter),
        },
        "cost per image": {
            f"params ({params})": (lambda r: r.params and r.params / per_param, significant_digits),
            flops: (lambda r: r.flops and r.flops / per_flop, significant_digits),
            flops.replace("FLOPs", "MACs"): (lambda r: r.macs and r.macs / per_flop, significant_digits),
        },
        "validation": {
            "top-1 %": percent("val/top1_pct"),
            "top-5 %": percent("val/top5_pct"),
            **{
                column: percent(key)
                for key, column in {
                    "val/ema_top1_pct": "EMA top-1 %",
                    "val/ema_top5_pct": "EMA top-5 %",
                    "val/real_top1_pct": "ReaL top-1 %",
                }.items()
                if has_metric(results, key)
            },
            "flop agreement %": percent("val/flop_agreement_pct"),
            "equivariance error": (lambda r: r.metrics.get("equivariance/max_rel_error"), format_error),
        },
        "speed": {
            "images/s": (lambda r: r.img_per_s, fixed_point(0)),
            "throughput ratio": (lambda r: r.throughput_ratio, fixed_point(2)),
            "FLOP ratio": (lambda r: r.flop_ratio, fixed_point(2)),
            "share %": (lambda r: r.share and 100 * r.share, fixed_point(0)),
        },
    }
    if sets := further_set_names(results):
        groups["further validation"] = {
            f"{name} {column}": percent(f"{name}/{key}") for name in sets for key, column in FURTHER_METRICS.items()
        }
    if any(result.paper for result in results):
        groups["the paper's"] = {
            "params (M)": (lambda r: r.paper and r.paper.params_m, fixed_point(1)),
            "GFLOPs": (lambda r: r.paper and r.paper.gflops_per_img, fixed_point(1)),
            "top-1 %, ImageNet": (lambda r: _paper_top1(r.paper), fixed_point(1)),
            "images/s, A100": (lambda r: r.paper and r.paper.throughput_a100_im_s, fixed_point(0)),
        }
    return groups


def _make_cell(value: float | str | None, formatter: Formatter) -> Cell:
    if value is None:
        return Cell(MISSING)
    return Cell(value, value) if isinstance(value, str) else Cell(formatter(value), value)


def _mean_cell(members: Sequence[RunResult], value: Getter, formatter: Formatter) -> Cell:
    """Returns the mean over the members. A text is kept only if all members share it."""
    values = [value(member) for member in members]
    if any(isinstance(known, str) for known in values):
        return _make_cell(values[0] if len(set(values)) == 1 else None, formatter)
    pooled = seed_spread(members, value)  # pyright: ignore[reportArgumentType]
    if pooled is None:
        return Cell(MISSING)
    low, high = formatter(pooled.low), formatter(pooled.high)
    return Cell(formatter(pooled.mean), pooled.mean, "" if low == high else f"{low}–{high}")


def _group_label(members: Sequence[RunResult]) -> str:
    good = sum(member.converged for member in members)
    seeds = f"{len(members)} seeds" if good in (0, len(members)) else f"{good} of {len(members)} seeds"
    return f"{members[0].group}, {seeds}" + " †" * (good == 0)


def _format_top1(members: Sequence[RunResult]) -> str:
    pooled = seed_spread(members, lambda r: r.top1_pct)
    if pooled is None:
        return ""
    return f"{pooled.mean:.1f}%" + (f" ({pooled.low:.1f}–{pooled.high:.1f})" if pooled.n > 1 else "")


def _paper_top1(paper: Table1Row | None) -> float | str | None:
    return "†" if paper and paper.top1 is None else paper and paper.top1
