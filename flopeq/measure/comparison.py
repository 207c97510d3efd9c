"""Measures the networks of the paper's Table 1 on the current device and stores the results as CSV.

One measurement covers X, E and H of one size, which alternate. Their rows are written together at its end, so an
interrupted run resumes with the sizes that are not in the file yet. Three columns compare a network with X: the FLOP
ratio (how many times fewer FLOPs), the throughput ratio (how many times faster), and the *share*, which is the
throughput ratio over the FLOP ratio.
"""

from __future__ import annotations

import csv
import math
import os
import platform
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import timm
import torch

from flopeq.hardware import can_compile, device_name, hardware_name
from flopeq.measure.flops import Complexity, complexity
from flopeq.measure.paper import Table1Row, table1
from flopeq.measure.throughput import (
    ProgressCallback,
    Protocol,
    Throughput,
    measure_throughput_if_fits,
    quartiles,
    throughput_ratios,
)
from flopeq.models.build import build, did_you_mean

IMAGE_SIZE = (3, 224, 224)


@dataclass(frozen=True)
class ComparisonRow:
    """One network: the measured values, the conditions, and the paper's values. None: not measured or not defined."""

    paper_name: str
    model: str
    family: str
    size: str
    variant: str
    params: int
    flops: int
    macs: int
    status: str
    """`ok`, or `out of memory`."""
    img_per_s: float | None
    img_per_s_q1: float | None
    img_per_s_q3: float | None
    peak_mem_mb: float | None
    first_pass_s: float | None
    flop_ratio: float | None
    """FLOPs of X over this network's; None for X itself."""
    throughput_ratio: float | None
    """This network's throughput over X's, the median over neighbouring passes."""
    throughput_ratio_q1: float | None
    throughput_ratio_q3: float | None
    share: float | None
    """throughput_ratio / flop_ratio."""
    alternating: bool
    """Whether it alternated with X; False if they did not fit into memory together."""
    paper_params_m: float
    paper_gflops: float
    paper_img_per_s: int | None
    """Forward pass on an A100-40GB at batch 64; None for training steps."""
    paper_peak_mem_mb: int | None
    paper_throughput_ratio: float | None
    paper_share: float | None
    device: str
    hardware: str
    threads: int | None
    """Number of torch threads on a CPU; None on a GPU."""
    dtype: str
    batch_size: int
    mode: str
    """`forward`, or `train`: forward, backward, optimizer."""
    compiled: bool
    fused_attention: bool
    warmup: int
    runs: int
    python: str
    torch: str
    timm: str
    flopeq: str


def select_rows(patterns: Sequence[str]) -> list[Table1Row]:
    """The rows of Table 1 that match any of the patterns and their baselines X, in the paper's order.

    A pattern is a size (`S`), a family (`vit`), a name in the paper (`E(ViT-S)`, `ViT-*`) or a model name. Patterns
    ignore case, and `*` matches any text. Without patterns the function returns all rows.
    Raises: ValueError for a pattern that matches no row.
    """
    rows = list(table1())
    selected: set[tuple[str, str]] = set()
    for pattern in patterns:
        found = [row for row in rows if any(_matches(name, pattern) for name in _names(row))]
        if not found:
            known = sorted({name for row in rows for name in _names(row)})
            raise ValueError(f"no row of Table 1 matches {pattern!r}{did_you_mean(pattern, known)}")
        for row in found:
            selected |= {(row.family + row.size, row.variant), (row.family + row.size, "X")}
    return [row for row in rows if not patterns or (row.family + row.size, row.variant) in selected]


def measure_table1(
    rows: Sequence[Table1Row],
    protocol: Protocol,
    device: torch.device | str,
    path: Path | None,
    on_progress: ProgressCallback | None = None,
    image_size: tuple[int, int, int] = IMAGE_SIZE,
    build: Callable[..., torch.nn.Module] = build,
) -> list[ComparisonRow]:
    """Measures the rows that `path` does not yet hold for this protocol, adds them to it, and returns all `rows`.

    The function replaces the whole file after each size, so the file is always complete. Without a path it measures
    all rows and saves nothing.
    """
    saved = {row.model: row for row in load_rows(path)} if path else {}
    groups: dict[tuple[str, str], list[Table1Row]] = {}
    for row in rows:
        groups.setdefault((row.family, row.size), []).append(row)
    for group in groups.values():
        if all(row.model in saved and _same_protocol(saved[row.model], protocol) for row in group):
            continue
        saved |= {row.model: row for row in _measure_group(group, protocol, device, on_progress, image_size, build)}
        if path:
            order = {row.model: index for index, row in enumerate(table1())}
            save_rows(path, sorted(saved.values(), key=lambda row: order[row.model]))
    return [saved[row.model] for row in rows]


def results_path(folder: Path, protocol: Protocol, device: torch.device | str) -> Path:
    """`folder`/table1-<hardware>-<dtype>-<batch>-<mode>-<versions>.csv."""
    conditions = _condition_columns(protocol, device)
    threads = f"{conditions['threads']} threads" if conditions["threads"] else ""
    parts = ["table1", conditions["hardware"], threads, conditions["dtype"], f"batch{conditions['batch_size']}",
             conditions["mode"], "" if conditions["compiled"] else "eager",
             "" if conditions["fused_attention"] else "unfused",
             *(f"{name}{conditions[name]}" for name in ("torch", "timm", "flopeq"))]  # fmt: skip
    return folder / ("-".join(filter(None, map(_slug, parts))) + ".csv")


def load_rows(path: Path) -> list[ComparisonRow]:
    """The rows of a file written by `save_rows`, or no rows if there is no file.

    Raises: ValueError for a file with other columns.
    """
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        names = [field.name for field in fields(ComparisonRow)]
        if table.fieldnames != names:
            raise ValueError(f"{path} has other columns than this version of flopeq writes: move it away")
        kinds = {field.name: str(field.type) for field in fields(ComparisonRow)}
        return [ComparisonRow(**{name: _parse(line[name], kind) for name, kind in kinds.items()}) for line in table]


def save_rows(path: Path, rows: Iterable[ComparisonRow]) -> None:
    """Writes the rows as CSV, with None as an empty field. The file appears only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [field.name for field in fields(ComparisonRow)], lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(row) for row in rows)
    os.replace(partial, path)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name.lower(), pattern.lower())


def _names(row: Table1Row) -> tuple[str, ...]:
    return row.paper_name, row.model, row.size, row.family


def _same_protocol(row: ComparisonRow, protocol: Protocol) -> bool:
    """Whether a row was measured with these numbers of passes. The name of the file states all other conditions."""
    return (row.warmup, row.runs) == (protocol.warmup, protocol.runs)


def _measure_group(
    group: Sequence[Table1Row],
    protocol: Protocol,
    device: torch.device | str,
    on_progress: ProgressCallback | None,
    image_size: tuple[int, int, int],
    build: Callable[..., torch.nn.Module],
) -> list[ComparisonRow]:
    """Measures the networks of one size of one family."""
    counts = {row.model: complexity(build(row.model, device="meta"), image_size) for row in group}
    measured, alternating = measure_throughput_if_fits(
        {row.model: lambda model=row.model: build(model) for row in group},
        image_size=image_size, protocol=protocol, device=device, on_progress=on_progress,
    )  # fmt: skip
    x = next(row for row in group if row.variant == "X")
    conditions = _condition_columns(protocol, device)
    rows = []
    for row in group:
        model, baseline = measured[row.model], measured[x.model]
        flop_ratio = None if row is x else counts[x.model].flops / counts[row.model].flops
        ratios = None
        if row is not x and model is not None and baseline is not None:
            ratios = ratio_with_quartiles(model, baseline, alternating)
        rows.append(
            ComparisonRow(
                **{key: getattr(row, key) for key in ("paper_name", "model", "family", "size", "variant")},
                **_measured_columns(model, counts[row.model]),
                flop_ratio=_round_significant(flop_ratio),
                **dict(zip(("throughput_ratio_q1", "throughput_ratio", "throughput_ratio_q3"),
                           map(_round_significant, ratios or 3 * (None,)), strict=True)),
                share=_round_significant(ratios[1] / flop_ratio) if ratios and flop_ratio else None,
                alternating=alternating,
                **_paper_columns(row, x, protocol),
                **conditions,
            )
        )  # fmt: skip
    return rows


def ratio_with_quartiles(model: Throughput, baseline: Throughput, alternating: bool) -> tuple[float, float, float]:
    """First quartile, median and third quartile of the throughput ratio; the quartiles are nan without alternation."""
    if not alternating:
        return math.nan, model.img_per_s / baseline.img_per_s, math.nan
    ratios = throughput_ratios(model, baseline)
    low, high = quartiles(ratios)
    return low, statistics.median(ratios), high


def _measured_columns(result: Throughput | None, counted: Complexity) -> dict:
    low, high = result.img_per_s_quartiles if result else (None, None)
    return {
        "params": counted.params, "flops": counted.flops, "macs": counted.macs,
        "status": "ok" if result else "out of memory",
        "img_per_s": _round_significant(result and result.img_per_s),
        "img_per_s_q1": _round_significant(low),
        "img_per_s_q3": _round_significant(high),
        "peak_mem_mb": _round_significant(result and result.peak_mem_mb),
        "first_pass_s": _round_significant(result and result.first_pass_s),
    }  # fmt: skip


def _paper_columns(row: Table1Row, x: Table1Row, protocol: Protocol) -> dict:
    """The paper's values. Throughput and memory are None for training steps, because the paper has forward passes."""
    img_per_s = None if protocol.train else row.throughput_a100_im_s
    ratio = None if row is x or protocol.train else row.throughput_a100_im_s / x.throughput_a100_im_s
    return {
        "paper_params_m": row.params_m,
        "paper_gflops": row.gflops_per_img,
        "paper_img_per_s": img_per_s,
        "paper_peak_mem_mb": None if protocol.train else row.peak_mem_mb,
        "paper_throughput_ratio": _round_significant(ratio),
        "paper_share": _round_significant(ratio and ratio * row.gflops_per_img / x.gflops_per_img),
    }


def _condition_columns(protocol: Protocol, device: torch.device | str) -> dict:
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": device_name(device),
        "hardware": hardware_name(device),
        "threads": None if on_gpu else torch.get_num_threads(),
        "dtype": str(protocol.dtype).removeprefix("torch."),
        "batch_size": protocol.batch_size,
        "mode": "train" if protocol.train else "forward",
        "compiled": protocol.compile and can_compile(device),
        "fused_attention": bool(timm.layers.use_fused_attn()),
        "warmup": protocol.warmup,
        "runs": protocol.runs,
        "python": platform.python_version(),
        "torch": torch.__version__.partition("+")[0],
        "timm": timm.__version__,
        "flopeq": flopeq_version(),
    }


@cache
def flopeq_version() -> str:
    """The version of the installed package, or `source` if flopeq is imported without being installed."""
    try:
        return version("flopeq")
    except PackageNotFoundError:
        return "source"


def _round_significant(value: float | None) -> float | None:
    """Rounds to six significant digits, which exceeds the precision of the timer; None for None and nan."""
    return None if value is None or math.isnan(value) else float(f"{value:.6g}")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower().replace("(r)", "").replace("(tm)", "")).strip("-")


def _parse(text: str, annotation: str) -> Any:
    kind = annotation.removesuffix(" | None")
    if not text and kind != annotation:
        return None
    return {"str": str, "int": int, "float": float, "bool": lambda word: word == "True"}[kind](text)
