"""Throughput of X and E at the paper's S sizes: this machine's from the stage `paper_sizes`, GPUs' from results/.

results/ holds files that people commit: `table1-*.csv` of `flopeq throughput --table1`, and the folders of
`benchmarks/on_gpu.py`. Only measurements of GPUs are taken from there. Without results/ there are none.
"""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flopeq.measure.comparison import IMAGE_SIZE
from flopeq.measure.flops import complexity
from flopeq.measure.paper import table1
from flopeq.models.build import build
from pipeline.base.files import read_json
from pipeline.reporting.speed import Quartiles

log = logging.getLogger(__name__)

_SIZE = "S"


@dataclass(frozen=True)
class SizeComparison:
    """E against X of one family at size S."""

    family: str
    x_name: str
    """The paper's name, such as `ViT-S`."""
    e_name: str
    x_img_per_s: float
    e_img_per_s: float
    ratio: Quartiles
    """Throughput of E over X. What its first and third number are is in `Measurement.bounds`."""
    flop_ratio: float
    """FLOPs of X over E."""

    @property
    def share(self) -> float:
        """Fraction of the saved FLOPs that becomes speed."""
        return self.ratio.median / self.flop_ratio


@dataclass(frozen=True)
class Measurement:
    """Comparisons that were measured together on one device."""

    device: str
    conditions: str
    """dtype, batch, compiled or not, versions, date."""
    bounds: str
    """What stands in brackets after a ratio."""
    is_this_machine: bool
    comparisons: tuple[SizeComparison, ...]

    @property
    def short_name(self) -> str:
        return "this machine" if self.is_this_machine else self.device

    @property
    def name(self) -> str:
        return f"this machine ({self.device})" if self.is_this_machine else self.device


def load_measurements(reports: Path = Path("reports"), results: Path = Path("results")) -> list[Measurement]:
    """Loads this machine's measurement, if there is one, then those of GPUs in `results`."""
    found = [_from_table1(read_json(reports / "paper_sizes.json", []), is_this_machine=True)]
    for path in sorted(results.glob("table1-*.csv")):
        rows = [row for row in _read_csv(path) if row["device"] != "cpu" and row["mode"] == "forward"]
        found.append(_from_table1(rows, is_this_machine=False))
    found += [_from_on_gpu(path.parent) for path in sorted(results.glob("on-gpu-*/rows.csv"))]
    return [measurement for measurement in found if measurement.comparisons]


def _from_table1(rows: Iterable[Mapping[str, Any]], *, is_this_machine: bool) -> Measurement:
    """Reads rows of `flopeq throughput --table1`: of its CSV, or of the stage, which adds the date."""
    known = {row["model"]: row for row in rows if row["size"] == _SIZE and row["status"] == "ok"}
    comparisons = []
    for x_model, e_model in _pairs():
        x, e = known.get(x_model), known.get(e_model)
        if not x or not e or not e["throughput_ratio"]:
            continue
        ratio = float(e["throughput_ratio"])
        bounds = [float(e[f"throughput_ratio_{name}"] or ratio) for name in ("q1", "q3")]
        comparisons.append(
            SizeComparison(
                family=x["family"],
                x_name=x["paper_name"],
                e_name=e["paper_name"],
                x_img_per_s=float(x["img_per_s"]),
                e_img_per_s=float(e["img_per_s"]),
                ratio=Quartiles(bounds[0], ratio, bounds[1]),
                flop_ratio=float(e["flop_ratio"]),
            )
        )
    first = next(iter(known.values()), None)
    if first is None:
        return Measurement("", "", "", is_this_machine, ())
    conditions = [
        str(first["dtype"]),
        f"batch {first['batch_size']}",
        "compiled" if str(first["compiled"]) == "True" else "eager",
        f"torch {first['torch']}",
        f"timm {first['timm']}",
        first.get("date"),
    ]
    threads = f", {first['threads']} threads" if first["threads"] else ""
    return Measurement(
        device=f"{first['hardware']}{threads}",
        conditions=", ".join(filter(None, conditions)),
        bounds="quartiles of the ratios of neighbouring passes",
        is_this_machine=is_this_machine,
        comparisons=tuple(comparisons),
    )


def _from_on_gpu(folder: Path) -> Measurement:
    """Reads a folder of `benchmarks/on_gpu.py`, whose name ends with dtype and batch."""
    device, settings = read_json(folder / "device.json", {}), re.search(r"-(\w+)-batch(\d+)$", folder.name)
    if not device or not settings:
        log.warning("%s: not in the report, because it lacks device.json, or dtype and batch in its name", folder)
        return Measurement("", "", "", False, ())
    dtype, batch_size = settings[1], int(settings[2])
    known = {
        row["model"]: row
        for row in _read_csv(folder / "rows.csv")
        if (row["mode"], row["who"], row["size"], row["status"]) == ("forward", "E", _SIZE, "ok")
    }
    names = {row.model: row for row in table1()}
    comparisons = tuple(
        SizeComparison(
            family=names[x_model].family,
            x_name=names[x_model].paper_name,
            e_name=names[e_model].paper_name,
            x_img_per_s=1000 * batch_size / float(row["x_ms"]),
            e_img_per_s=1000 * batch_size / float(row["ms"]),
            ratio=Quartiles(*(float(row[key]) for key in ("faster_lowest", "faster", "faster_highest"))),
            flop_ratio=_count_flops(x_model) / _count_flops(e_model),
        )
        for x_model, e_model in _pairs()
        if (row := known.get(e_model))
    )
    return Measurement(
        device=device["device"],
        conditions=f"{dtype}, batch {batch_size}, compiled, torch {device['torch']}, {device['date']}",
        bounds="lowest to highest of several rounds",
        is_this_machine=False,
        comparisons=comparisons,
    )


def _pairs() -> list[tuple[str, str]]:
    """Models of X and E at size S, in the paper's order of families."""
    rows = [row for row in table1() if row.size == _SIZE]
    x = {row.family: row.model for row in rows if row.variant == "X"}
    e = {row.family: row.model for row in rows if row.variant == "E"}
    return [(x[family], e[family]) for family in ("vit", "resmlp", "convnext_iso")]


def _count_flops(model: str) -> int:
    return complexity(build(model, device="meta"), IMAGE_SIZE).flops


def _read_csv(path: Path) -> Sequence[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))
