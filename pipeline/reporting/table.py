"""The comparison as a table: one row per run, and a mean row for runs that differ only in their seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flopeq.hub.model_card import format_p
from flopeq.measure.paper import Table1Row
from pipeline.evaluation.pairing import Comparison
from pipeline.evaluation.statistics import Interval
from pipeline.reporting.pooled_seeds import PooledSeeds
from pipeline.reporting.run_results import (
    FURTHER_METRICS,
    RunResult,
    group_by_seed,
    pooled_throughput_ratio,
    seed_spread,
)
from pipeline.reporting.speed import Quartiles, quartiles_of

MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """The text of a cell and its sort key. None sorts last."""

    text: str
    sort_key: float | str | None = None
    spread: str = ""
    """The bounds of its 95% interval, or else the lowest and the highest of several seeds."""

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


class Estimate(NamedTuple):
    """A value with its 95% interval."""

    value: float
    interval: Interval | None


class Column(NamedTuple):
    """How to fill a column."""

    value: Getter
    formatter: Formatter
    interval: Callable[[RunResult], Interval | None] = lambda _: None
    pooled: Callable[[PooledSeeds], Estimate | None] | None = None
    """What a row that stands for all seeds shows, if it is not the mean of `value`."""


def build_table(results: Sequence[RunResult]) -> Table:
    """Builds the comparison table, with the paper's columns if a run is a model of the paper."""
    groups = _column_groups(results)
    columns = [(heading, column) for group in groups.values() for heading, column in group.items()]
    rows = []
    for members in group_by_seed(results):
        cells = tuple(_group_cell(members, column) for _, column in columns)
        if len(members) == 1:
            rows.append(Row(members[0].run, cells))
            continue
        name = Cell(group_label(members), members[0].group)
        rows.append(Row(members[0].group, (name, *cells[1:]), len(members)))
        rows += [Row(r.run, tuple(_run_cell(r, column) for _, column in columns)) for r in members]
    return Table(
        groups=tuple((name, len(group)) for name, group in groups.items()),
        columns=tuple(name for name, *_ in columns),
        rows=tuple(rows),
        num_text_columns=len(groups[""]),
        footnotes=tuple(f"† {r.run} did not converge: {r.failure}." for r in results if r.failure),
    )


def summarize_runs(results: Sequence[RunResult]) -> list[str]:
    """Returns a sentence for each E, H and S with a baseline X, for each E and H with an S(X), for each tuned recipe.

    Seeds share one sentence.

    Which is better is said by the interval of the difference in top-1, never by its sign.
    """
    groups = {member.run: members for members in group_by_seed(results) for member in members}
    sentences = []
    for members in group_by_seed(results):
        first, label = members[0], members[0].label if len(members) == 1 else group_label(members)
        flop_ratio = seed_spread(members, lambda r: r.flop_ratio)
        if flop_ratio is not None and first.baseline in groups:
            baseline = groups[first.baseline]
            phrases = [f"{1 / flop_ratio.mean:.2f} of the FLOPs of {baseline[0].group}"]
            if faster := pooled_throughput_ratio(members):
                phrases.append(f"{faster} times its throughput")
            phrases += _compare_top1(members, baseline, first.pooled and first.pooled.minus_baseline)
            sentences.append(f"{label}: {', '.join(phrases)}.")
        if first.symmetrized_baseline in groups:
            symmetrized = groups[first.symmetrized_baseline]
            compared = _compare_top1(members, symmetrized, first.pooled and first.pooled.minus_symmetrized)
            both = [seed_spread(side, lambda r: r.flops) for side in (members, symmetrized)]
            if both[0] and both[1]:
                compared.insert(0, f"{both[0].mean / both[1].mean:.2f} of the FLOPs of {symmetrized[0].group}")
            sentences.append(f"{label}, against the symmetrized X: {', '.join(compared)}.")
        if first.own_recipe_run in groups:
            own = groups[first.own_recipe_run]
            compared = _compare_top1(members, own, first.pooled and first.pooled.minus_own_recipe)
            sentences += [
                f"{label}: with the recipe that was tuned from {own[0].group}'s, {text}." for text in compared
            ]
    return sentences


def describe_difference(comparison: Comparison) -> str:
    """Returns the verdict on a difference in top-1 with its interval."""
    low, high = (signed(bound) for bound in comparison.interval)
    test = "" if comparison.mcnemar_p is None else f"; McNemar's p {format_p(comparison.mcnemar_p)}"
    return f"{comparison.verdict} ({signed(comparison.difference_pct)} points, 95% interval {low} to {high}{test})"


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


def signed(value: float) -> str:
    """Formats a difference in percentage points, with its sign unless it rounds to zero."""
    return f"{value:+.2f}" if round(value, 2) else "0.00"


def significant_digits(value: float) -> str:
    """Formats three significant digits; the integer part is never rounded."""
    return f"{value:,.{max(0, min(3, 2 - math.floor(math.log10(value or 1))))}f}"


def format_error(value: float) -> str:
    """Formats a relative error, in scientific notation below 0.01."""
    return f"{value:.1e}" if value < 0.01 else f"{value:.2f}"


def _column_groups(results: Sequence[RunResult]) -> dict[str, dict[str, Column]]:
    (per_flop, flops), (per_param, params) = flop_unit(results), param_unit(results)
    formatter = significant_digits  # never called for text columns

    def percent(key: str) -> Column:
        return Column(lambda r: r.metrics.get(key), fixed_point(1))

    groups: dict[str, dict[str, Column]] = {
        "": {
            "run": Column(lambda r: r.label, formatter),
            "model": Column(lambda r: r.name, formatter),
            "variant": Column(lambda r: r.variant, formatter),
        },
        "cost per image": {
            f"params ({params})": Column(lambda r: r.params and r.params / per_param, significant_digits),
            flops: Column(lambda r: r.flops and r.flops / per_flop, significant_digits),
            flops.replace("FLOPs", "MACs"): Column(lambda r: r.macs and r.macs / per_flop, significant_digits),
        },
        "validation top-1": {
            "top-1 %": percent("val/top1_pct")._replace(
                interval=lambda r: r.top1_interval, pooled=lambda p: Estimate(p.top1_pct, p.top1_interval)
            ),
            **(_difference_columns() if any(r.minus_baseline for r in results) else {}),
            **(_symmetrized_column() if any(r.minus_symmetrized for r in results) else {}),
        },
        "validation": {
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
            "equivariance error": Column(lambda r: r.metrics.get("equivariance/max_rel_error"), format_error),
        },
        "speed": {
            "images/s": Column(lambda r: r.img_per_s, fixed_point(0), lambda r: _bounds(r.throughput_quartiles)),
            "throughput ratio": Column(
                lambda r: r.throughput_ratio, fixed_point(2), lambda r: _bounds(quartiles_of(r.throughput_ratios))
            ),
            "FLOP ratio": Column(lambda r: r.flop_ratio, fixed_point(2)),
            "share %": Column(lambda r: r.share and 100 * r.share, fixed_point(0)),
        },
    }
    if sets := further_set_names(results):
        groups["further validation"] = {
            f"{name} {column}": percent(f"{name}/{key}") for name in sets for key, column in FURTHER_METRICS.items()
        }
    if any(result.paper for result in results):
        groups["the paper's"] = {
            "params (M)": Column(lambda r: r.paper and r.paper.params_m, fixed_point(1)),
            "GFLOPs": Column(lambda r: r.paper and r.paper.gflops_per_img, fixed_point(1)),
            "top-1 %, ImageNet": Column(lambda r: _paper_top1(r.paper), fixed_point(1)),
            "images/s, A100": Column(lambda r: r.paper and r.paper.throughput_a100_im_s, fixed_point(0)),
        }
    return groups


def _bounds(found: Quartiles | None) -> Interval | None:
    return found and Interval(found.first, found.third)


def _difference_columns() -> dict[str, Column]:
    def minus_x(p: PooledSeeds) -> Estimate | None:
        return p.minus_baseline and Estimate(p.minus_baseline.difference_pct, p.minus_baseline.interval)

    def p_value(p: PooledSeeds) -> Estimate | None:
        known = p.minus_baseline.mcnemar_p if p.minus_baseline else None
        return None if known is None else Estimate(known, None)

    return {
        "top-1 minus X's": Column(
            lambda r: r.minus_baseline and r.minus_baseline.difference_pct,
            signed,
            lambda r: r.minus_baseline and r.minus_baseline.interval,
            minus_x,
        ),
        "McNemar's p": Column(lambda r: r.minus_baseline and r.minus_baseline.mcnemar_p, format_p, pooled=p_value),
    }


def _symmetrized_column() -> dict[str, Column]:
    def minus_symmetrized(p: PooledSeeds) -> Estimate | None:
        return p.minus_symmetrized and Estimate(p.minus_symmetrized.difference_pct, p.minus_symmetrized.interval)

    return {
        "top-1 minus S(X)'s": Column(
            lambda r: r.minus_symmetrized and r.minus_symmetrized.difference_pct,
            signed,
            lambda r: r.minus_symmetrized and r.minus_symmetrized.interval,
            minus_symmetrized,
        )
    }


def _group_cell(members: Sequence[RunResult], column: Column) -> Cell:
    """Returns the cell of a row that stands for one run or for all seeds of it."""
    if column.pooled and (pooled := members[0].pooled):
        estimate = column.pooled(pooled)
        return Cell(MISSING) if estimate is None else _number_cell(estimate.value, estimate.interval, column.formatter)
    return _run_cell(members[0], column) if len(members) == 1 else _mean_cell(members, column)


def _run_cell(result: RunResult, column: Column) -> Cell:
    value = column.value(result)
    if isinstance(value, str) or value is None:
        return Cell(MISSING) if value is None else Cell(value, value)
    return _number_cell(value, column.interval(result), column.formatter)


def _number_cell(value: float, interval: Interval | None, formatter: Formatter) -> Cell:
    return Cell(formatter(value), value, format_range(interval.low, interval.high, formatter) if interval else "")


def format_range(low: float, high: float, formatter: Formatter) -> str:
    """Formats two bounds, with a dash between them unless they have signs."""
    return f"{formatter(low)}{' to ' if formatter is signed else '–'}{formatter(high)}"


def _mean_cell(members: Sequence[RunResult], column: Column) -> Cell:
    """Returns the mean over the members. A text is kept only if all members share it."""
    values = [column.value(member) for member in members]
    if any(isinstance(known, str) for known in values):
        return Cell(str(values[0]), values[0]) if len(set(values)) == 1 else Cell(MISSING)
    spread = seed_spread(members, column.value)  # pyright: ignore[reportArgumentType]
    if spread is None:
        return Cell(MISSING)
    low, high = column.formatter(spread.low), column.formatter(spread.high)
    return Cell(column.formatter(spread.mean), spread.mean, "" if low == high else f"{low}–{high}")


def group_label(members: Sequence[RunResult]) -> str:
    """Returns the name of several seeds of a run, with the number of those that converged."""
    good = sum(member.converged for member in members)
    seeds = f"{len(members)} seeds" if good in (0, len(members)) else f"{good} of {len(members)} seeds"
    return f"{members[0].group}, {seeds}" + " †" * (good == 0)


def _compare_top1(
    members: Sequence[RunResult], others: Sequence[RunResult], comparison: Comparison | None
) -> list[str]:
    """Returns a phrase on both sides' top-1, with the verdict if they can be compared; none if either is unknown."""
    both = [_format_top1(side) for side in (members, others)]
    if not all(both):
        return []
    return [f"top-1 {both[0]} against {both[1]}" + (f": {describe_difference(comparison)}" if comparison else "")]


def _format_top1(members: Sequence[RunResult]) -> str:
    spread = seed_spread(members, lambda r: r.top1_pct)
    return "" if spread is None else f"{spread.mean:.1f}%" + " †" * (not any(member.converged for member in members))


def _paper_top1(paper: Table1Row | None) -> float | str | None:
    return "†" if paper and paper.top1 is None else paper and paper.top1
