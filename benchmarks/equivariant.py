"""Compares E(X) and H(X) with X, and with the authors' code on the same weights, in alternation.

    python benchmarks/equivariant.py                                   E of the S sizes, forward, compiled
    python benchmarks/equivariant.py --sizes B L --variants E H --modes forward train --batch-size 4
    python benchmarks/equivariant.py --variants H --splits all         H with 1, 2, ... equivariant blocks
    python benchmarks/equivariant.py --authors PATH --markdown         compare with a checkout of the authors' code

X, E, H and the authors' E and H of one size alternate pass by pass. `FLOPs` is the count of X over that of the network.
`faster` is the throughput over that of X, the median over neighbouring passes, with quartiles. `share` is `faster` over
`FLOPs`, the share of the saved FLOPs that became speed. `authors` is the throughput of flopeq over that of the authors'
code, and `authors' MB` the same for peak memory, which is measured on a GPU only. The script first checks that both
give the same logits for the same weights.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flopeq.backends import depthwise, onednn
from flopeq.backends.malloc import keep_freed_memory
from flopeq.hardware import hardware_name
from flopeq.hub.convert import convert_authors_state_dict, infer_args
from flopeq.measure.comparison import ratio_with_quartiles
from flopeq.measure.flops import complexity
from flopeq.measure.throughput import Protocol, Throughput, measure_throughput_if_fits, protocol_for
from flopeq.models.build import ModelError, build
from flopeq.registry import MODELS, PREFIXES, ModelInfo
from flopeq.testing import relative_error
from tests.hub.authors.make_fixture import stand_in_for_old_timm

IMAGE_SIZE = (3, 224, 224)
COLUMNS = ("network", "mode", "img/s", "quartiles", "peak MB", "FLOPs", "faster", "quartiles", "share", "authors",
           "authors' MB")  # fmt: skip
SAME = 1e-9
"""Relative difference between our logits and the authors', in float64."""

AUTHORS = {
    ("vit", "E"): ("deit.models.d2_vit", "d2_deit_{}_LS", {"use_fused_attn": True}),
    ("vit", "H"): ("deit.models.hybrid", "hybrid_deit_{}_LS", {"use_fused_attn": True}),
    ("resmlp", "E"): ("deit.models.d2_resmlp", "resmlp_equi_d2_{}", {}),
    ("convnext_iso", "E"): ("convnext.models.d2_convnext_isotropic", "d2_convnext_isotropic_{}", {}),
}
"""Where the authors define a network; they have hybrids of the ViT only."""
SIZES = {
    "vit": {"S": "small_patch16", "B": "base_patch16", "L": "large_patch16", "H": "huge_patch14"},
    "resmlp": {"T": "12", "S": "24", "B": "B_24", "L": "L_24"},
    "convnext_iso": {"S": "small", "B": "base", "L": "large"},
}


class Network(NamedTuple):
    """X, E, or H; H at a split point of its own where one is named."""

    info: ModelInfo
    split: int | None = None

    @property
    def name(self) -> str:
        return self.info.paper_name + ("" if self.split is None else f", {self.split} equivariant")

    def build(self, **args: Any) -> nn.Module:
        return build(self.info.model, **args, **({} if self.split is None else {"num_flop_blocks": self.split}))


def main() -> None:
    args = parse()
    if args.authors:
        stand_in_for_old_timm(args.authors.resolve())
    if args.unfused:
        timm.layers.set_fused_attn(False)
    if args.plain:
        onednn.enable_onednn(False)
        depthwise.enable_summed_gradient(False)
    if not args.give_back:
        keep_freed_memory()
    defaults = protocol_for(args.device)
    rows = []
    for x in MODELS.values():
        if x.variant != "X" or x.family not in args.families or x.size not in args.sizes:
            continue
        networks = networks_of(x, args)
        authors = [one for one in networks if of_authors_too(one)] if args.authors else []
        for one in authors:
            check_same(one.info, args)
        for mode in args.modes:
            for compiled in {"compiled": [True], "eager": [False], "both": [False, True]}[args.run]:
                protocol = replace(
                    defaults, compile=compiled, train=mode == "train",
                    batch_size=args.batch_size or defaults.batch_size, runs=args.runs or defaults.runs,
                    dtype=getattr(torch, args.dtype) if args.dtype else defaults.dtype,
                )  # fmt: skip
                rows += measure(networks, authors, protocol, args)
    show(rows, args)


def networks_of(x: ModelInfo, args: argparse.Namespace) -> list[Network]:
    """X and its variants that were asked for."""
    networks = [Network(x)]
    for variant in args.variants:
        info = MODELS.get(PREFIXES[variant] + x.model)
        if info is None:  # a family without this group
            continue
        splits = args.splits if variant == "H" else [None]
        if splits == ["all"]:
            splits = range(1, len(build(x.model, device="meta").blocks))
        networks += [Network(info, split) for split in splits]
    return networks


def of_authors_too(network: Network) -> bool:
    """Whether the authors define this network."""
    return (network.info.family, network.info.variant) in AUTHORS and network.split is None


def measure(
    networks: list[Network], authors: list[Network], protocol: Protocol, args: argparse.Namespace
) -> list[tuple[str, ...]]:
    """One size in one alternating run: a row of cells for each network."""
    builders: dict[str, Callable[[], nn.Module]] = {one.name: one.build for one in networks}
    builders |= {f"authors' {one.name}": partial(of_authors, one.info, not args.unfused) for one in authors}
    measured, alternating = measure_throughput_if_fits(
        builders, image_size=IMAGE_SIZE, protocol=protocol, device=args.device
    )
    x = networks[0]
    flops = {one: complexity(one.build(device="meta"), IMAGE_SIZE).flops for one in networks}
    compiled = any(one.compiled for one in measured.values() if one)
    mode = f"{'train' if protocol.train else 'forward'}, {'compiled' if compiled else 'eager'}"
    rows = []
    for one in networks:
        ours, theirs, over = (measured.get(key) for key in (one.name, f"authors' {one.name}", x.name))
        saved = None if one is x else flops[x] / flops[one]
        low, faster, high = (
            ratio_with_quartiles(ours, over, alternating) if ours and over and saved else (None, None, None)
        )
        rows.append(
            (
                one.name, mode, *speed(ours), cell(saved, 2), cell(faster, 3),
                "" if low is None else f"{low:.3f} to {high:.3f}",
                cell(faster and saved and faster / saved, 2),
                cell(ours and theirs and ratio_with_quartiles(ours, theirs, alternating)[1], 3),
                cell(ours and theirs and ours.peak_mem_mb and theirs.peak_mem_mb
                     and ours.peak_mem_mb / theirs.peak_mem_mb, 2),
            )
        )  # fmt: skip
        print(*rows[-1], sep="  ", file=sys.stderr)
    return rows


def check_same(info: ModelInfo, args: argparse.Namespace) -> None:
    """Ends the benchmark unless our network gives the authors' logits on the authors' weights."""
    theirs = of_authors(info, not args.unfused).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:  # LayerScales of 1e-6 would hide the contribution of the blocks
                parameter.add_(0.05 * torch.randn_like(parameter))
        tensors = convert_authors_state_dict(theirs.state_dict(), info.model)
        ours = build(info.model, **infer_args(tensors, info.model)).double().eval()
        ours.load_state_dict(tensors)
        image_BCHW = torch.randn(1, *IMAGE_SIZE, dtype=torch.float64)
        error = relative_error(*(model.to(args.device)(image_BCHW.to(args.device)) for model in (ours, theirs)))
    if not error < SAME:
        sys.exit(f"error: {info.model} and the authors' differ by {error:.1e} on the same weights")
    print(f"{info.paper_name}: the authors' logits on the same weights to {error:.0e}", file=sys.stderr)


def of_authors(info: ModelInfo, fused: bool) -> nn.Module:
    """The authors' network of ours."""
    module, pattern, options = AUTHORS[info.family, info.variant]
    name = pattern.format(SIZES[info.family][info.size])
    options = {key: value and fused for key, value in options.items()}
    return getattr(import_module(module), name)(**options).eval()


def speed(of: Throughput | None) -> tuple[str, str, str]:
    """Images per second, their quartiles, peak memory."""
    if of is None:
        return "out of memory", "", ""
    low, high = of.img_per_s_quartiles
    return f"{of.img_per_s:.1f}", f"{low:.1f} to {high:.1f}", cell(of.peak_mem_mb, 0)


def cell(value: float | None, digits: int) -> str:
    return "" if not value else f"{value:.{digits}f}"


def show(rows: list[tuple[str, ...]], args: argparse.Namespace) -> None:
    """The table, without columns that nothing stands in; and how it was measured."""
    used = [place for place in range(len(COLUMNS)) if any(row[place] for row in rows)]
    table = [tuple(row[place] for place in used) for row in (COLUMNS, *rows)]
    if args.markdown:
        table.insert(1, tuple("---" if place < 2 else "---:" for place in used))
        lines = [f"| {' | '.join(row)} |" for row in table]
    else:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in table]
    defaults = protocol_for(args.device)
    on = hardware_name(args.device) + ("" if "cuda" in args.device else f", {torch.get_num_threads()} threads")
    dtype = args.dtype or str(defaults.dtype).removeprefix("torch.")
    kernels = ("unfused" if args.unfused else "fused") + " attention"
    if args.plain:
        kernels += ", E by X's library calls"
    print(*lines, sep="\n")
    print(
        f"\n{on}; {dtype}, batch {args.batch_size or defaults.batch_size}, {args.runs or defaults.runs} passes, "
        f"{kernels}; torch {torch.__version__}, timm {timm.__version__}."
    )


def split_point(word: str) -> int | str:
    return word if word == "all" else int(word)


def parse() -> argparse.Namespace:
    sizes = sorted({info.size for info in MODELS.values()})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--sizes", nargs="+", default=["S"], choices=sizes)
    parser.add_argument("--variants", nargs="+", default=["E"], choices=list(PREFIXES)[1:])
    parser.add_argument("--splits", nargs="+", default=[None], type=split_point, metavar="N",
                        help="numbers of equivariant blocks in H, or all; default: half of the blocks")  # fmt: skip
    parser.add_argument("--modes", nargs="+", default=["forward"], choices=["forward", "train"])
    parser.add_argument("--run", default="compiled", choices=["compiled", "eager", "both"])
    parser.add_argument("--authors", type=Path, metavar="PATH", help="a checkout of the authors' repository")
    parser.add_argument("--batch-size", type=int, help="images per pass; default: the device's protocol")
    parser.add_argument("--runs", type=int, help="timed passes per model; default: the device's protocol")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="default: the device's protocol")
    parser.add_argument("--unfused", action="store_true", help="compute attention with separate products and a softmax")
    parser.add_argument("--plain", action="store_true",
                        help="on a CPU: make E use the library calls of X")  # fmt: skip
    parser.add_argument("--give-back", action="store_true",
                        help="on a CPU: return freed memory to the system, malloc's default")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--markdown", action="store_true", help="print a table for the docs")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        main()
    except ModelError as error:
        sys.exit(f"error: {error}")
