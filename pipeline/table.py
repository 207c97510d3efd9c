"""The comparison as a table: a row a run, and one more where runs differ in nothing but their seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flopeq.paper import Table1Row
from pipeline.report import FURTHER, Result, grouped, spread

NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """What is printed, and what it is sorted by; None goes last."""

    text: str
    order: float | str | None = None
    spread: str = ""
    """The lowest and the highest of several seeds."""

    def __str__(self) -> str:
        return f"{self.text} ({self.spread})" if self.spread else self.text


@dataclass(frozen=True)
class Row:
    """A run, or several seeds of it with their mean; `run` is the run, or the first of them."""

    run: str
    cells: tuple[Cell, ...]
    members: int = 0
    """How many of the rows that follow are its seeds."""


@dataclass(frozen=True)
class Table:
    """The comparison, ready to print."""

    groups: tuple[tuple[str, int], ...]
    """Headings above the columns' and how many columns each spans."""
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    num_text_columns: int
    """The first columns hold words, the others numbers."""
    footnotes: tuple[str, ...] = ()

    @property
    def texts(self) -> list[list[str]]:
        """The rows, as words alone."""
        return [[str(cell) for cell in row.cells] for row in self.rows]

    @property
    def blocks(self) -> list[list[Row]]:
        """The rows that stay together in whatever order: seeds with their mean."""
        blocks, left = [], 0
        for row in self.rows:
            if left:
                blocks[-1].append(row)
                left -= 1
            else:
                blocks.append([row])
                left = row.members
        return blocks


Value = Callable[[Result], float | str | None]
Words = Callable[[float], str]


def tabulate(results: Sequence[Result]) -> Table:
    """The comparison table; the paper's columns are there if a run is a model of the paper."""
    groups = _columns(results)
    columns = [(heading, *column) for group in groups.values() for heading, column in group.items()]
    rows = []
    for members in grouped(results):
        if len(members) > 1:
            cells = [_pooled(members, value, words) for _, value, words in columns]
            name = Cell(_group_label(members), members[0].group)
            rows.append(Row(members[0].group, (name, *cells[1:]), len(members)))
        rows += [Row(r.run, tuple(_cell(value(r), words) for _, value, words in columns)) for r in members]
    return Table(
        groups=tuple((name, len(group)) for name, group in groups.items()),
        columns=tuple(name for name, *_ in columns),
        rows=tuple(rows),
        num_text_columns=len(groups[""]),
        footnotes=tuple(f"† {r.run} did not converge: {r.failure}." for r in results if r.failure),
    )


def summarize(results: Sequence[Result]) -> list[str]:
    """A sentence for each E and H that has its X beside it; for several seeds, one."""
    groups = {member.run: members for members in grouped(results) for member in members}
    sentences = []
    for members in grouped(results):
        flop_ratio = spread(members, lambda r: r.flop_ratio)
        if flop_ratio is None or members[0].baseline is None:
            continue
        theirs = groups[members[0].baseline]
        said = [f"{1 / flop_ratio.mean:.2f} of the FLOPs of {theirs[0].group}"]
        if faster := spread(members, lambda r: r.throughput_ratio):
            said.append(f"{faster.mean:.2f} times its throughput")
        both = [_top1(side) for side in (members, theirs)]
        if all(both):
            said.append(f"top-1 {both[0]} against {both[1]}")
        label = members[0].label if len(members) == 1 else _group_label(members)
        sentences.append(f"{label}: {', '.join(said)}.")
    return sentences


def further(results: Sequence[Result]) -> list[str]:
    """Names of the further validation sets that some run was measured on."""
    names = (key.partition("/")[0] for result in results for key in result.measured)
    return [name for name in dict.fromkeys(names) if name not in ("val", "equivariance")]


def any_has(results: Sequence[Result], key: str) -> bool:
    """Whether some run has a value of that name in its metrics.json."""
    return any(key in result.measured for result in results)


def flop_unit(results: Sequence[Result]) -> tuple[float, str]:
    """What to divide FLOPs by, and the name of what comes out."""
    return (1e9, "GFLOPs") if any((r.flops or 0) >= 1e9 for r in results) else (1e6, "MFLOPs")


def param_unit(results: Sequence[Result]) -> tuple[float, str]:
    """What to divide parameters by, and the name of what comes out."""
    return (1e6, "M") if any((r.params or 0) >= 1e6 for r in results) else (1e3, "k")


def fixed(digits: int) -> Words:
    """A number with that many digits after the point."""
    return lambda value: f"{value:,.{digits}f}"


def figures(value: float) -> str:
    """Three significant digits, as far as the decimal point."""
    return f"{value:,.{max(0, min(3, 2 - math.floor(math.log10(value or 1))))}f}"


def error(value: float) -> str:
    """A relative error: its order of magnitude where it is small."""
    return f"{value:.1e}" if value < 0.01 else f"{value:.2f}"


def _columns(results: Sequence[Result]) -> dict[str, dict[str, tuple[Value, Words]]]:
    (per_flop, flops), (per_param, params) = flop_unit(results), param_unit(results)
    words = figures  # never called for columns of words

    def percent(key: str) -> tuple[Value, Words]:
        return lambda r: r.measured.get(key), fixed(1)

    groups: dict[str, dict[str, tuple[Value, Words]]] = {
        "": {
            "run": (lambda r: r.label, words),
            "model": (lambda r: r.name, words),
            "variant": (lambda r: r.variant, words),
        },
        "cost per image": {
            f"params ({params})": (lambda r: r.params and r.params / per_param, figures),
            flops: (lambda r: r.flops and r.flops / per_flop, figures),
            flops.replace("FLOPs", "MACs"): (lambda r: r.macs and r.macs / per_flop, figures),
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
                if any_has(results, key)
            },
            "flop agreement %": percent("val/flop_agreement_pct"),
            "equivariance error": (lambda r: r.measured.get("equivariance/max_rel_error"), error),
        },
        "speed": {
            "images/s": (lambda r: r.img_per_s, fixed(0)),
            "throughput ratio": (lambda r: r.throughput_ratio, fixed(2)),
            "FLOP ratio": (lambda r: r.flop_ratio, fixed(2)),
            "share %": (lambda r: r.share and 100 * r.share, fixed(0)),
        },
    }
    if sets := further(results):
        groups["further validation"] = {
            f"{name} {column}": percent(f"{name}/{key}") for name in sets for key, column in FURTHER.items()
        }
    if any(result.paper for result in results):
        groups["the paper's"] = {
            "params (M)": (lambda r: r.paper and r.paper.params_m, fixed(1)),
            "GFLOPs": (lambda r: r.paper and r.paper.gflops_per_img, fixed(1)),
            "top-1 %, ImageNet": (lambda r: _paper_top1(r.paper), fixed(1)),
            "images/s, A100": (lambda r: r.paper and r.paper.throughput_a100_im_s, fixed(0)),
        }
    return groups


def _cell(value: float | str | None, words: Words) -> Cell:
    if value is None:
        return Cell(NOTHING)
    return Cell(value, value) if isinstance(value, str) else Cell(words(value), value)


def _pooled(members: Sequence[Result], value: Value, words: Words) -> Cell:
    """The mean over the members; of words, those that all share."""
    values = [value(member) for member in members]
    if any(isinstance(known, str) for known in values):
        return _cell(values[0] if len(set(values)) == 1 else None, words)
    pooled = spread(members, value)  # pyright: ignore[reportArgumentType]
    if pooled is None:
        return Cell(NOTHING)
    low, high = words(pooled.low), words(pooled.high)
    return Cell(words(pooled.mean), pooled.mean, "" if low == high else f"{low}–{high}")


def _group_label(members: Sequence[Result]) -> str:
    good = sum(member.converged for member in members)
    seeds = f"{len(members)} seeds" if good in (0, len(members)) else f"{good} of {len(members)} seeds"
    return f"{members[0].group}, {seeds}" + " †" * (good == 0)


def _top1(members: Sequence[Result]) -> str:
    pooled = spread(members, lambda r: r.top1_pct)
    if pooled is None:
        return ""
    return f"{pooled.mean:.1f}%" + (f" ({pooled.low:.1f}–{pooled.high:.1f})" if pooled.n > 1 else "")


def _paper_top1(paper: Table1Row | None) -> float | str | None:
    return "†" if paper and paper.top1 is None else paper and paper.top1
