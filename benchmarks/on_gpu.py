"""Measures on a GPU in minutes: Table 1, training steps, other block layouts, single products and profiles.

    python benchmarks/on_gpu.py --out DIR                             all waves, most important first
    python benchmarks/on_gpu.py --out DIR --waves 1 2 --seconds 500   selected waves
    python benchmarks/on_gpu.py --out DIR --authors PATH              compare with a checkout of the authors' code
    python benchmarks/on_gpu.py --out DIR --dry                       test the script with small networks on a CPU

A wave compiles its networks in parallel, each in its own process, and then times one pair at a time. X and the other
network alternate in rounds of twenty passes each; the result is the median ratio over rounds. The protocol is the
paper's (batch 64, float16 autocast), except for `mode="reduce-overhead"` of torch.compile, which compiles in a tenth of
the time of `max-autotune`. Wave 6 uses `max-autotune`. The script writes every result at once to `rows.csv`,
`products.csv`, `kernels.csv` or `device.json`.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_worker import Job, Network

from flopeq.registry import MODELS, PREFIXES

log = logging.getLogger("on_gpu")

WAVES: dict[int, list[str]] = {
    1: ["forward vit S E batched triton H authors", "forward vit B E batched triton H authors",
        "forward convnext_iso S E authors"],
    2: ["forward resmlp S E authors", "forward convnext_iso B E authors", "forward resmlp B E authors",
        "forward vit L E batched triton H", "forward resmlp T E"],
    3: ["train vit S E batched authors", "train convnext_iso S E authors", "train resmlp S E authors"],
    4: ["train vit B E authors", "train convnext_iso B E"],
    5: ["forward vit H E triton H", "forward convnext_iso L E", "forward resmlp L E"],
    6: ["max-autotune vit S E", "max-autotune vit B E", "max-autotune convnext_iso S E", "max-autotune resmlp S E"],
}  # fmt: skip
"""Mode, family, size, and the networks that take turns with X: E and H, E with another block, the authors' E."""
PROFILED = ("E", "X", "batched", "triton")
ROUNDS, PASSES = 7, 20


@dataclass(frozen=True)
class Clock:
    """Seconds since the start, and until the end."""

    seconds: float
    start: float

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)


def main() -> None:
    args = parse()
    clock = Clock(args.seconds, time.monotonic())
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "device.json").write_text(json.dumps(describe_device(args.dry), indent=1))
    log.info("%s", (args.out / "device.json").read_text())
    for wave in args.waves:
        if clock.left() < 60:
            log.warning("no time left for wave %d", wave)
            continue
        if wave == 0:
            measure_products(args, clock)
        else:
            run_wave([job for line in WAVES[wave] for job in jobs_of(line, args)], args, clock)


def describe_device(dry: bool) -> dict[str, Any]:
    """Name, versions, and the two ceilings: copies in device memory and a large float16 product."""
    import torch
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
    if dry:
        return {"device": "cpu"} | versions
    from triton.testing import do_bench

    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_(0, 255) for _ in range(2))
    copy_ms = do_bench(lambda: target.copy_(source), return_mode="median")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    product_ms = do_bench(lambda: a @ b, return_mode="median")
    return {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda} | versions | {
        "copy_tb_per_s": 2 * source.nbytes / copy_ms / 1e9,
        "float16_product_tflop_per_s": 2 * 8192**3 / product_ms / 1e9,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def jobs_of(line: str, args: argparse.Namespace) -> list[Job]:
    """The networks of one line of `WAVES`, X first."""
    mode, family, size, *others = line.split()
    x = next(info.model for info in MODELS.values() if (info.family, info.size, info.variant) == (family, size, "X"))
    jobs = []
    for who in ("X", *others):
        if who == "authors" and (args.dry or not args.authors):
            continue
        prefix = {"X": "", "H": PREFIXES["H"]}.get(who, PREFIXES["E"])
        block = who if who in ("batched", "triton") else "library"
        authors = str(args.authors.resolve()) if who == "authors" else None
        jobs.append(Job(mode, family, size, who, prefix + x, block, authors, args.dry))
    return jobs


def run_wave(jobs: list[Job], args: argparse.Namespace, clock: Clock) -> None:
    """Compiles all networks side by side, then times each pair and profiles."""
    log.info("compiling %d networks, %.0f s left", len(jobs), clock.left())
    networks = {job: Network(job, threads=max(1, (os.cpu_count() or 2) // len(jobs))) for job in jobs}
    waiting = set(networks)
    while waiting and clock.left() > 12:
        for job in list(waiting):
            if networks[job].is_settled(timeout=0.05):
                waiting.discard(job)
                log.info("%s settled, %.0f s left", job.name, clock.left())
                if networks[job].error:
                    log.error("%s failed: %s", job.name, networks[job].error)
                    append(args.out / "rows.csv", [{**job.columns(), "status": networks[job].error.splitlines()[-1]}])
    for job in waiting:
        log.error("%s was not ready in time", job.name)
    ready = {job: network for job, network in networks.items() if job not in waiting and not network.error}
    log.info("%d networks ready, %.0f s left", len(ready), clock.left())
    try:
        for job in ready:
            x = next((other for other in ready if other.is_baseline_of(job)), None)
            if x is None or clock.left() < 5:
                continue
            row = {**job.columns(), "status": "ok", **ready[job].facts, **time_pair(ready[x], ready[job], args.dry)}
            append(args.out / "rows.csv", [row])
            log.info("%s", {key: value for key, value in row.items() if value not in ("", None)})
        for job in ready:
            if job.mode != "max-autotune" and job.who in PROFILED and job.size in "SB" and clock.left() > 5:
                append(args.out / "kernels.csv", [job.columns() | kernel for kernel in ready[job].ask("profile")])
    finally:
        for network in networks.values():
            network.close()


def time_pair(x: Network, other: Network, dry: bool) -> dict[str, float]:
    """Median milliseconds of a pass of both, and how many times faster the other is than X: median, lowest, highest."""
    ratios, x_s, other_s = [], [], []
    for _ in range(2 if dry else ROUNDS):
        turn_x, turn_other = (network.ask("time", 2 if dry else PASSES) for network in (x, other))
        ratios.append(statistics.median(turn_x) / statistics.median(turn_other))
        x_s += turn_x
        other_s += turn_other
    return {
        "x_ms": round(1e3 * statistics.median(x_s), 4), "ms": round(1e3 * statistics.median(other_s), 4),
        "faster": round(statistics.median(ratios), 4),
        "faster_lowest": round(min(ratios), 4), "faster_highest": round(max(ratios), 4),
        "x_peak_mem_mb": x.facts["peak_mem_mb"],
    }  # fmt: skip


def measure_products(args: argparse.Namespace, clock: Clock) -> None:
    """Products of a block alone, after the Triton kernels have been compared with float64."""
    import torch
    from gpu_products import largest_error, time_products

    if args.dry:
        log.info("products need a GPU")
        return
    for dtype in (torch.float16, torch.bfloat16):
        log.info("triton kernels, %s: largest relative error %.1e", dtype, largest_error(
            "cuda", dtype, ((1000, 576, 192), (333, 768, 192), (333, 640, 200))))  # fmt: skip
    append(args.out / "products.csv", time_products(min(70, clock.left() - 20)))
    print((args.out / "products.csv").read_text())


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Adds rows to a CSV whose columns grow with what is added."""
    old = list(csv.DictReader(path.open())) if path.exists() else []
    columns = list(dict.fromkeys(key for row in (*old, *rows) for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows((*old, *rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the results; existing files are appended to"
    )
    parser.add_argument("--waves", type=int, nargs="+", default=[1, 0, 2, 3, 4, 5, 6], choices=[0, *WAVES],
                        help="what to measure; 0: single products")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=540, help="time limit")
    parser.add_argument("--authors", type=Path, metavar="PATH", help="a checkout of the authors' repository")
    parser.add_argument("--dry", action="store_true", help="small networks on a CPU")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(format="%(relativeCreated)7.0f ms  %(message)s", level=logging.INFO, stream=sys.stdout)
    multiprocessing.set_start_method("spawn")
    main()
