"""The paper's Table 1 measured on the device at hand: our figures beside the paper's, kept as CSV.

X, E and H of one size take turns in one measurement, and their rows are written together when it is done, so that a
run that was interrupted goes on with the sizes that are not yet there. The claim has three columns: how many times
fewer FLOPs than X, how many times faster than X, and the *share* of the first that the second reached,
throughput ratio over FLOP ratio.
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

from flopeq.benchmark import (
    Protocol,
    Tell,
    Throughput,
    can_compile,
    device_name,
    gains,
    hardware_name,
    quartiles,
    throughput_where_it_fits,
)
from flopeq.build import build, nearest
from flopeq.flops import Complexity
from flopeq.flops import complexity as count
from flopeq.paper import Table1Row, table1

IMAGE_SIZE = (3, 224, 224)


@dataclass(frozen=True)
class Row:
    """One network: what was measured, how, and what the paper prints. None: not measured, or not defined."""

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
    """This network's throughput over X's: the median over neighbouring passes."""
    throughput_ratio_q1: float | None
    throughput_ratio_q3: float | None
    share: float | None
    """throughput_ratio / flop_ratio."""
    alternating: bool
    """Whether it was measured in turns with X; False where both did not fit into memory together."""
    paper_params_m: float
    paper_gflops: float
    paper_img_per_s: int | None
    """On an A100-40GB at batch 64, forward; None beside training steps."""
    paper_peak_mem_mb: int | None
    paper_throughput_ratio: float | None
    paper_share: float | None
    device: str
    hardware: str
    threads: int | None
    """Threads of torch on a CPU; None on a GPU."""
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


def select(patterns: Sequence[str]) -> list[Table1Row]:
    """The rows of Table 1 that any of the patterns names, in the paper's order, each group's X with them.

    A pattern is a size (`S`), a family (`vit`), a name as the paper has it (`E(ViT-S)`, `ViT-*`) or a model's; capitals
    do not matter, `*` stands for anything. No pattern: all rows.
    Raises: ValueError for a pattern that names nothing.
    """
    rows = list(table1())
    chosen: set[tuple[str, str]] = set()
    for pattern in patterns:
        found = [row for row in rows if any(_matches(name, pattern) for name in _names(row))]
        if not found:
            known = sorted({name for row in rows for name in _names(row)})
            raise ValueError(f"no row of Table 1 is called {pattern!r}{nearest(pattern, known)}")
        for row in found:
            chosen |= {(row.family + row.size, row.variant), (row.family + row.size, "X")}
    return [row for row in rows if not patterns or (row.family + row.size, row.variant) in chosen]


def compare(
    rows: Sequence[Table1Row],
    protocol: Protocol,
    device: torch.device | str,
    path: Path,
    tell: Tell | None = None,
    image_size: tuple[int, int, int] = IMAGE_SIZE,
    build: Callable[..., torch.nn.Module] = build,
) -> list[Row]:
    """Measures the rows that `path` does not hold yet by this protocol, writes them there, and returns all asked for.

    The file is replaced as a whole after each size, so that it is never half written.
    """
    kept = {row.model: row for row in read(path)}
    groups: dict[tuple[str, str], list[Table1Row]] = {}
    for row in rows:
        groups.setdefault((row.family, row.size), []).append(row)
    for group in groups.values():
        if all(row.model in kept and _same_effort(kept[row.model], protocol) for row in group):
            continue
        kept |= {row.model: row for row in _measure(group, protocol, device, tell, image_size, build)}
        order = {row.model: place for place, row in enumerate(table1())}
        write(path, sorted(kept.values(), key=lambda row: order[row.model]))
    return [kept[row.model] for row in rows]


def results_path(folder: Path, protocol: Protocol, device: torch.device | str) -> Path:
    """`folder`/table1-<hardware>-<dtype>-<batch>-<mode>-<versions>.csv."""
    how = _how(protocol, device)
    words = ["table1", how["hardware"], f"{how['threads']} threads" if how["threads"] else "", how["dtype"],
             f"batch{how['batch_size']}", how["mode"], "" if how["compiled"] else "eager",
             "" if how["fused_attention"] else "unfused",
             *(f"{name}{how[name]}" for name in ("torch", "timm", "flopeq"))]  # fmt: skip
    return folder / ("-".join(filter(None, map(_slug, words))) + ".csv")


def read(path: Path) -> list[Row]:
    """The rows of a file that `write` wrote; none where there is no file. Raises: ValueError for another's file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        names = [field.name for field in fields(Row)]
        if table.fieldnames != names:
            raise ValueError(f"{path} has other columns than this version writes: move it away")
        kinds = {field.name: str(field.type) for field in fields(Row)}
        return [Row(**{name: _parse(line[name], kind) for name, kind in kinds.items()}) for line in table]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Writes the rows as CSV, None as an empty field; the file is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(row) for row in rows)
    os.replace(partial, path)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name.lower(), pattern.lower())


def _names(row: Table1Row) -> tuple[str, ...]:
    return row.paper_name, row.model, row.size, row.family


def _same_effort(row: Row, protocol: Protocol) -> bool:
    """What the file's name does not say."""
    return (row.warmup, row.runs) == (protocol.warmup, protocol.runs)


def _measure(
    group: Sequence[Table1Row],
    protocol: Protocol,
    device: torch.device | str,
    tell: Tell | None,
    image_size: tuple[int, int, int],
    build: Callable[..., torch.nn.Module],
) -> list[Row]:
    """One size of one family."""
    counts = {row.model: count(build(row.model, device="meta"), image_size) for row in group}
    measured, alternating = throughput_where_it_fits(
        {row.model: lambda model=row.model: build(model) for row in group},
        image_size=image_size, protocol=protocol, device=device, tell=tell,
    )  # fmt: skip
    x = next(row for row in group if row.variant == "X")
    how = _how(protocol, device)
    rows = []
    for row in group:
        of, over = measured[row.model], measured[x.model]
        flop_ratio = None if row is x else counts[x.model].flops / counts[row.model].flops
        ratios = None if row is x or of is None or over is None else ratio(of, over, alternating)
        rows.append(
            Row(
                **{key: getattr(row, key) for key in ("paper_name", "model", "family", "size", "variant")},
                **_figures(of, counts[row.model]),
                flop_ratio=_digits(flop_ratio),
                **dict(zip(("throughput_ratio_q1", "throughput_ratio", "throughput_ratio_q3"),
                           map(_digits, ratios or 3 * (None,)), strict=True)),
                share=_digits(ratios[1] / flop_ratio) if ratios and flop_ratio else None,
                alternating=alternating,
                **_papers(row, x, protocol),
                **how,
            )
        )  # fmt: skip
    return rows


def ratio(of: Throughput, over: Throughput, alternating: bool) -> tuple[float, float, float]:
    """(quartile, median, quartile) of how many times faster `of` was; only the median where they did not alternate."""
    if not alternating:
        whole = of.img_per_s / over.img_per_s
        return math.nan, whole, math.nan
    pairs = gains(of, over)
    low, high = quartiles(pairs)
    return low, statistics.median(pairs), high


def _figures(of: Throughput | None, counted: Complexity) -> dict:
    low, high = of.img_per_s_quartiles if of else (None, None)
    return {
        "params": counted.params, "flops": counted.flops, "macs": counted.macs,
        "status": "ok" if of else "out of memory",
        "img_per_s": _digits(of and of.img_per_s), "img_per_s_q1": _digits(low), "img_per_s_q3": _digits(high),
        "peak_mem_mb": _digits(of and of.peak_mem_mb), "first_pass_s": _digits(of and of.first_pass_s),
    }  # fmt: skip


def _papers(row: Table1Row, x: Table1Row, protocol: Protocol) -> dict:
    """The paper's figures; those of its forward pass have no place beside training steps."""
    speed = None if protocol.train else row.throughput_a100_im_s
    faster = None if row is x or protocol.train else row.throughput_a100_im_s / x.throughput_a100_im_s
    return {
        "paper_params_m": row.params_m,
        "paper_gflops": row.gflops_per_img,
        "paper_img_per_s": speed,
        "paper_peak_mem_mb": None if protocol.train else row.peak_mem_mb,
        "paper_throughput_ratio": _digits(faster),
        "paper_share": _digits(faster and faster * row.gflops_per_img / x.gflops_per_img),
    }


def _how(protocol: Protocol, device: torch.device | str) -> dict:
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
    """The installed package's, or `source` where it is used from a folder without being installed."""
    try:
        return version("flopeq")
    except PackageNotFoundError:
        return "source"


def _digits(value: float | None) -> float | None:
    """Six significant digits, which is more than a clock gives; None stays, and so does what is not a number."""
    return None if value is None or math.isnan(value) else float(f"{value:.6g}")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower().replace("(r)", "").replace("(tm)", "")).strip("-")


def _parse(text: str, annotation: str) -> Any:
    kind = annotation.removesuffix(" | None")
    if not text and kind != annotation:
        return None
    return {"str": str, "int": int, "float": float, "bool": lambda word: word == "True"}[kind](text)
