"""The data of the paper's Table 1 (Bökman et al. 2025)."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Table1Row:
    """One row of the table, with the digits that the paper prints."""

    paper_name: str
    """Name in the paper, such as `E(ViT-S)`."""
    family: str
    """`vit`, `resmlp` or `convnext_iso`."""
    size: str
    """`T`, `S`, `B`, `L` or `H`."""
    variant: str
    """`X` (ordinary), `E` (equivariant) or `H` (hybrid)."""
    model: str
    """Name in timm's registry."""
    params_m: float
    """Millions of parameters. E(ConvNeXt) B and L include frozen zeros, which are not parameters in flopeq."""
    throughput_a100_im_s: int
    """Images per second of the forward pass on one A100-40GB, batch 64, compiled, mixed precision."""
    gflops_per_img: float
    """10^9 operations per image, in the convention of `flopeq.measure.flops`."""
    peak_mem_mb: int
    """Peak MB of device memory in that forward pass."""
    top1: float | None
    """Percent on ImageNet-1K; None if the training diverged (the dagger of E(ViT-S))."""


@cache
def table1() -> tuple[Table1Row, ...]:
    """The 25 rows of the table, in the paper's order."""
    lines = (files("flopeq.measure") / "table1.csv").read_text(encoding="utf-8").splitlines()
    return tuple(_parse_row(fields) for fields in csv.DictReader(lines))


def strip_size(paper_name: str) -> str:
    """Removes the size from a name: "E(ResMLP-B24)" -> "E(ResMLP)"."""
    return re.sub(r"-[TSBLH]\d*(?=\W|$)", "", paper_name)


def _parse_row(fields: dict[str, str]) -> Table1Row:
    return Table1Row(
        **{key: fields[key] for key in ("paper_name", "family", "size", "variant", "model")},
        params_m=float(fields["params_m"]),
        throughput_a100_im_s=int(fields["throughput_a100_im_s"]),
        gflops_per_img=float(fields["gflops_per_img"]),
        peak_mem_mb=int(fields["peak_mem_mb"]),
        top1=float(fields["top1"]) if fields["top1"] else None,
    )
