"""Throughput of E(X) over X, compiled, in one alternating run, beside the ratio of their FLOPs.

    python benchmarks/equivariant.py                 the S sizes of the three families
    python benchmarks/equivariant.py --size B --batch-size 4 --runs 20

`share` is how much of the saved FLOPs arrives as speed: the throughput ratio E/X over the FLOP ratio X/E.
Ratios are medians over pairs of neighbouring passes, with their quartiles.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from dataclasses import asdict, replace

import torch

import flopeq  # noqa: F401  registers our models
from flopeq.benchmark import Protocol, Throughput, protocol_for, throughput
from flopeq.build import build
from flopeq.flops import complexity
from flopeq.registry import MODELS

IMAGE_SIZE = (3, 224, 224)
ROW = "{:18} {:>9} {:>9} {:>7} {:>15} {:>7} {:>7}"


def main() -> None:
    args = parse()
    defaults = protocol_for(args.device)
    protocol = replace(
        defaults,
        batch_size=args.batch_size or defaults.batch_size,
        runs=args.runs or defaults.runs,
        compile=not args.eager,
    )
    print(ROW.format("X", "X img/s", "E img/s", "E/X", "quartiles", "FLOPs", "share"))
    for x in MODELS.values():
        if (x.variant, x.size) == ("X", args.size):
            compare(x.model, protocol, args.device)


def compare(x: str, protocol: Protocol, device: str) -> None:
    """Measures a baseline and its equivariant network, and prints their row."""
    names = {"X": x, "E": f"flop_{x}"}
    counts = {key: complexity(build(name, device="meta"), IMAGE_SIZE) for key, name in names.items()}
    torch.manual_seed(0)
    models = {key: build(name) for key, name in names.items()}
    measured = throughput(models, image_size=IMAGE_SIZE, device=device, **asdict(protocol))
    low, ratio, high = statistics.quantiles(ratios(measured["E"], measured["X"]), n=4, method="inclusive")
    saved = counts["X"].flops / counts["E"].flops
    speeds = (f"{measured[key].img_per_s:.2f}" for key in names)
    quartiles = f"{low:.3f} to {high:.3f}"
    cells = (*speeds, f"{ratio:.3f}", quartiles, f"{saved:.3f}", f"{ratio / saved:.3f}")
    print(ROW.format(MODELS[x].paper_name, *cells), how(measured["X"]), flush=True)


def ratios(of: Throughput, over: Throughput) -> list[float]:
    """How many times faster `of` was than `over`, pass by pass."""
    return [slow / fast for fast, slow in zip(of.seconds, over.seconds, strict=True)]


def how(measured: Throughput) -> str:
    """The protocol in a few words."""
    mode = "compiled" if measured.compiled else "eager"
    on = measured.device if measured.device != "cpu" else f"cpu ({torch.get_num_threads()} threads)"
    return f" {on}, {measured.dtype}, batch {measured.batch_size}, {mode}, {measured.runs} passes"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="S", choices=sorted({info.size for info in MODELS.values()}))
    parser.add_argument("--batch-size", type=int, help="images per pass; default: the device's protocol")
    parser.add_argument("--runs", type=int, help="timed passes per model; default: the device's protocol")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    main()
