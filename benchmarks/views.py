"""Compares the designs for several images, each under a group of its own: as it is, efficient, and full product.

    python -m benchmarks.views                                         2, 3 and 4 images under c4
    python -m benchmarks.views --model deit3_small_patch16_224 --image-size 224 --views 2 --markdown

One encoder of timm gives the features of every image, and a linear layer joins them, with which both designs are the
same function. The networks alternate pass by pass. FLOPs and time are for one sample, that is, for all of its images.
The ratios are those of the full product over the network, in time the median over neighbouring passes, with quartiles.
The full product runs its encoder anew for every combination, as a network that joins its images at once has to.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import timm
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from flopeq import MultiView
from flopeq.backends.malloc import keep_freed_memory
from flopeq.hardware import hardware_name
from flopeq.measure.flops import complexity
from flopeq.measure.throughput import quartiles
from flopeq.square import symmetry_group

COLUMNS = ("images", "network", "passes", "GFLOPs", "time (ms)", "FLOPs ratio", "time ratio", "quartiles")


class Join(nn.Module):
    """A linear layer on the features of all images. Shape: N tensors (B, C) -> (B, classes)."""

    def __init__(self, num_images: int, num_features: int, num_classes: int = 10) -> None:
        super().__init__()
        self.linear = nn.Linear(num_images * num_features, num_classes)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.linear(torch.cat(features, dim=1))


class Stacked(nn.Module):
    """Takes the images of a sample as one tensor, so that their operations can be counted. Shape: (N, C, H, W)."""

    def __init__(self, network: MultiView) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return self.network(*images_NCHW.flatten(0, 1).split(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--group", default="c4")
    parser.add_argument("--views", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--runs", type=int, default=7, help="timed passes of each network")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()
    rows = [row for number in args.views for row in measure(number, args)]
    separator = " | " if args.markdown else "  "
    table = [COLUMNS, *(("---",) * len(COLUMNS) for _ in range(args.markdown)), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(COLUMNS))]
    for row in table:
        line = separator.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(f"| {line} |" if args.markdown else line.rstrip())
    print(f"\n{args.model}, {args.image_size} x {args.image_size}, group {args.group}, batch 1, float32, eager, "
          f"{torch.get_num_threads()} threads, {hardware_name('cpu')}, torch {torch.__version__}, "
          f"timm {timm.__version__}")  # fmt: skip


def measure(number: int, args: argparse.Namespace) -> list[tuple[str, ...]]:
    """One row for each network for this number of images."""
    encoder = timm.create_model(args.model, num_classes=0).eval()
    if isinstance(encoder, VisionTransformer):
        encoder.set_input_size((args.image_size, args.image_size))
    images = list(torch.randn(number, 1, 3, args.image_size, args.image_size))
    fuse = Join(number, encoder(images[0]).shape[1]).eval()
    order = len(symmetry_group(args.group))
    passes = {"as it is": number, "efficient": number * order, "full product": number * order**number}
    networks = {
        "as it is": MultiView([encoder] * number, "trivial", fuse=fuse),
        "efficient": MultiView([encoder] * number, args.group, fuse=fuse),
        "full product": MultiView([encoder] * number, args.group, fuse=fuse, full=True),
    }
    with torch.inference_mode():
        torch.testing.assert_close(*(networks[name](*images) for name in ("efficient", "full product")))
        seconds = time_alternating([lambda n=network: n(*images) for network in networks.values()], args.runs)
    size = (number, 3, args.image_size, args.image_size)
    flops = [complexity(Stacked(network), size).flops for network in networks.values()]  # pyright: ignore[reportArgumentType]
    rows = []
    for name, counted, times in zip(networks, flops, seconds, strict=True):
        ratios = [full / own for full, own in zip(seconds[-1], times, strict=True)]
        low, high = quartiles(ratios)
        rows.append(
            (str(number), name, str(passes[name]), f"{counted / 1e9:.3f}", f"{1e3 * statistics.median(times):.1f}",
             f"{flops[-1] / counted:.1f}", f"{statistics.median(ratios):.1f}", f"{low:.1f} to {high:.1f}")
        )  # fmt: skip
    return rows


def time_alternating(calls: Sequence[Callable[[], object]], runs: int) -> list[list[float]]:
    """Seconds of every call in each of the passes, in which the calls alternate after one that is not timed."""
    seconds: list[list[float]] = [[] for _ in calls]
    for run in range(runs + 1):
        for call, times in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if run:
                times.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
