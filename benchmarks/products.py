"""Compares a matrix product of X with the two products of half the width in E, with MKL and with oneDNN.

    python benchmarks/products.py                    the products of ViT-S, batch 8
    python benchmarks/products.py --width 768        the products of ViT-B

A ratio of 2.00 means the whole saving. The values are medians over neighbouring turns, with quartiles, in float32
without gradients.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flopeq.backends import onednn
from flopeq.hardware import hardware_name

TOKENS = 8 * 197
TURN_S = 0.02
"""Minimum duration of a turn, in which its product is repeated."""


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384, help="width of X; default: that of ViT-S")
    parser.add_argument("--turns", type=int, default=30)
    args = parser.parse_args()
    if not onednn._AVAILABLE:
        sys.exit("error: oneDNN is not available on this machine")
    print("| in | tokens x in -> out of X | X/E by MKL | X/E by oneDNN | X by MKL / E by oneDNN | E: MKL / oneDNN |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, inside, out in (("qkv", 1, 3), ("proj", 1, 1), ("fc1", 1, 4), ("fc2", 4, 1)):
        inside, out = inside * args.width, out * args.width
        x_mkl, x_onednn, e_mkl, e_onednn = measure_alternating(
            [make_products(inside, out, halves, by_onednn) for halves in (1, 2) for by_onednn in (False, True)],
            args.turns,
        )
        pairs = ((x_mkl, e_mkl), (x_onednn, e_onednn), (x_mkl, e_onednn), (e_mkl, e_onednn))
        print(f"| {name} | {TOKENS} x {inside} -> {out} |", *(f"{ratios(*pair)} |" for pair in pairs), flush=True)
    print(f"\n{hardware_name('cpu')}, {torch.get_num_threads()} threads; torch {torch.__version__}.")


def make_products(inside: int, out: int, halves: int, by_onednn: bool) -> Callable[[], None]:
    """Returns a call that makes `halves` products, each of so large a part of the features, by oneDNN or by MKL."""
    shape = TOKENS, inside // halves
    operands = [(torch.randn(shape), torch.randn(out // halves, shape[1]), torch.randn(out // halves))
                for _ in range(halves)]  # fmt: skip
    return partial(run_products, operands, by_onednn)


def run_products(operands: list[tuple[Tensor, Tensor, Tensor]], by_onednn: bool) -> None:
    product = torch.ops.flopeq.linear if by_onednn else F.linear
    for x, weight, bias in operands:
        product(x, weight, bias)


def measure_alternating(calls: list[Callable[[], None]], turns: int) -> list[list[float]]:
    """Seconds of each call, by turns; three calls beforehand warm up and set how often a turn repeats it."""
    repeats = [max(1, round(TURN_S / min(seconds(call, 1) for _ in range(3)))) for call in calls]
    rounds = [[seconds(call, n) for call, n in zip(calls, repeats, strict=True)] for _ in range(turns)]
    return [list(column) for column in zip(*rounds, strict=True)]


def seconds(call: Callable[[], None], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def ratios(slow: list[float], fast: list[float]) -> str:
    pairs = [a / b for a, b in zip(slow, fast, strict=True)]
    low, median, high = statistics.quantiles(pairs, n=4, method="inclusive")
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
