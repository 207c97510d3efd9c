"""The command `flopeq profile`: time of a forward pass by kind of layer."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from flopeq.cli.app import app, format_examples
from flopeq.cli.options import (
    Autocast,
    BatchSize,
    Device,
    FusedAttention,
    ImageSize,
    Json,
    ModelWords,
    input_size,
    parse_model_args,
    select_device,
)
from flopeq.cli.output import format_fixed, print_line, print_rows, progress_bar


@app.command(
    epilog=format_examples(
        "profile deit3_small_patch16_224 flop_deit3_small_patch16_224",
        "profile flop_convnext_iso_base --no-compile --trace traces",
    )
)
def profile(
    words: ModelWords,
    device: Device = None,
    batch_size: BatchSize = None,
    runs: Annotated[int, typer.Option(min=1, help="Profiled passes.")] = 5,
    dtype: Autocast = None,
    compile: Annotated[bool, typer.Option(help="Also profile the compiled model.")] = True,
    fused_attention: FusedAttention = True,
    image_size: ImageSize = None,
    trace: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Folder for Chrome traces.")] = None,
    as_json: Json = False,
) -> None:
    """Show the time of a forward pass by kind of layer, eager and compiled.

    The kinds are linear, attention, norm, activation, convolution, change of basis, and other. A fused kernel of the
    compiled network is listed under all kinds that it contains, because its time cannot be divided between them.
    """
    import timm
    import torch

    from flopeq.hardware import can_compile
    from flopeq.measure import profiling
    from flopeq.measure.throughput import protocol_for
    from flopeq.models.build import build

    names, args = parse_model_args(words)
    torch_device = select_device(device)
    defaults = protocol_for(torch_device)
    if not fused_attention:
        timm.layers.set_fused_attn(False)
    modes = ["eager", "compiled"] if compile and can_compile(torch_device) else ["eager"]
    if compile and len(modes) == 1:
        print("no C++ compiler or Python headers for torch.compile: profiling eager only", file=sys.stderr)
    profiles = []
    with progress_bar() as on_progress:
        for name in names:
            model = build(name, **args)
            for mode in modes:
                on_progress(f"{name}, {mode}", len(profiles), len(names) * len(modes))
                trace_file = None if trace is None else trace / f"{name}-{mode}.json"
                profiles.append(
                    profiling.profile(
                        model, name, image_size=input_size(model, args, image_size), device=torch_device, runs=runs,
                        batch_size=batch_size or defaults.batch_size, compiled=mode == "compiled", trace=trace_file,
                        dtype=getattr(torch, dtype) if dtype else defaults.dtype,
                    )
                )  # fmt: skip
    if as_json:
        print_rows([asdict(result) for result in profiles], as_json)
        return
    first = profiles[0]
    print_line(f"{first.device}, {first.dtype}, batch {first.batch_size}, ms per forward pass, median of {runs} passes")
    for name in names:
        print_line(f"\n{name}")
        of_model = [result for result in profiles if result.model == name]
        kinds = list(dict.fromkeys(kind for result in of_model for kind in result.kinds))
        table = []
        for kind in [*kinds, "sum", "a pass, without the profiler"]:
            row: dict[str, Any] = {"": kind}
            for result in of_model:
                totals = {"sum": result.sum_ms, "a pass, without the profiler": result.pass_ms}
                ms = totals.get(kind, result.kinds.get(kind))
                row[f"{result.mode} (ms)"] = format_fixed(ms)
                row[f"{result.mode} (%)"] = format_fixed(None if ms is None else 100 * ms / result.sum_ms, 1)
            table.append(row)
        print_rows(table, as_json)
        for result in of_model:
            if result.trace:
                print_line(f"trace: {result.trace}")
