"""The command `flopeq throughput`: measures models in alternation, or the rows of Table 1."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

# The commands import torch and timm themselves, so that shell completion does not wait for them.
if TYPE_CHECKING:
    import torch

    from flopeq.measure.comparison import ComparisonRow
    from flopeq.measure.throughput import Protocol
from flopeq.cli.app import app, format_examples
from flopeq.cli.options import (
    MODELS_ARGUMENT,
    Autocast,
    BatchSize,
    Device,
    FusedAttention,
    ImageSize,
    Json,
    input_size,
    parse_model_args,
    select_device,
)
from flopeq.cli.output import format_cell, format_fixed, print_line, print_rows, progress_bar


@app.command(
    epilog=format_examples(
        "throughput deit3_small_patch16_224 flop_deit3_small_patch16_224",
        "throughput flop_convnext_iso_base --train --batch-size 32 --dtype bfloat16",
        "throughput --table1",
        "throughput --table1 --rows S --rows 'E(ViT-B)' --json",
    )
)
def throughput(
    words: Annotated[list[str] | None, MODELS_ARGUMENT] = None,
    table1: Annotated[bool, typer.Option("--table1", help="Measure the rows of the paper's Table 1.")] = False,
    rows: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="With --table1: select rows by size (S), family (vit), name (ViT-*, "
                     "'E(ViT-S)') or model. Baselines X are included. Can be repeated."),
    ] = None,
    results: Annotated[Path, typer.Option(help="With --table1: folder for the measured results.")] = Path(
        "results"
    ),
    train: Annotated[bool, typer.Option("--train", help="Measure training steps: forward, backward, AdamW.")] = False,
    device: Device = None,
    batch_size: BatchSize = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Untimed passes per model.")] = None,
    runs: Annotated[int | None, typer.Option(min=1, help="Timed passes per model.")] = None,
    dtype: Autocast = None,
    compile: Annotated[bool, typer.Option(help="Measure the compiled model.")] = True,
    fused_attention: FusedAttention = True,
    image_size: ImageSize = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure throughput and peak memory of models that run in alternation.

    On a GPU the defaults are the paper's protocol: batch 64, compiled, float16 autocast, 10 warm-up and 100 timed
    passes. On a CPU the batch and the counts are smaller, and the dtype is float32. The first model is the baseline
    for the others.

    --table1 prints the paper's Table 1 with the measured values beside the paper's. It writes the results as CSV to
    results/, one file per device, dtype and versions. Rows already in the file are not measured again, so the command
    resumes an interrupted measurement. Delete the file to start over. A network that does not fit into memory gets a
    row that says so.
    """
    import timm
    import torch

    from flopeq.measure.throughput import protocol_for

    torch_device = select_device(device)
    given = {"batch_size": batch_size, "warmup": warmup, "runs": runs, "dtype": dtype and getattr(torch, dtype)}
    given = {key: value for key, value in given.items() if value is not None}
    protocol = replace(protocol_for(torch_device), compile=compile, train=train, **given)
    if not fused_attention:
        timm.layers.set_fused_attn(False)
    if table1:
        if words or image_size:
            raise ValueError("--table1 takes no models and no --image-size: select rows of the table with --rows")
        _measure_table1(rows or [], protocol, torch_device, results, as_json)
    elif rows:
        raise ValueError("--rows selects rows of Table 1: add --table1")
    else:
        _measure_models(words or [], protocol, torch_device, image_size, as_json)


def _measure_models(
    words: list[str], protocol: Protocol, device: torch.device, side: int | None, as_json: bool
) -> None:
    from flopeq.measure.flops import complexity
    from flopeq.measure.throughput import throughput, throughput_ratio
    from flopeq.models.build import build

    names, args = parse_model_args(words)
    models = {name: build(name, **args) for name in names}
    sizes = {input_size(model, args, side) for model in models.values()}
    if len(sizes) > 1:
        raise ValueError(f"the models take images of different sizes, {sorted(sizes)}: set --image-size")
    [size] = sizes
    is_comparison = len(names) > 1
    flops = {name: complexity(build(name, device="meta", **args), size).flops for name in names if is_comparison}
    with progress_bar() as on_progress:
        measured = throughput(models, image_size=size, device=device, on_progress=on_progress, **asdict(protocol))
    first = measured[names[0]]
    rows = []
    for name, result in measured.items():
        flop_ratio = flops[names[0]] / flops[name] if is_comparison else None
        ratio = throughput_ratio(result, first) if is_comparison else None
        rows.append({
            "model": name, "device": result.device, "dtype": result.dtype, "batch_size": result.batch_size,
            "mode": _mode_name(protocol), "img_per_s": result.img_per_s,
            "img_per_s_quartiles": result.img_per_s_quartiles,
            "peak_mem_mb": result.peak_mem_mb, "compiled": result.compiled, "first_pass_s": result.first_pass_s,
            "runs": result.runs, "flop_ratio": flop_ratio, "throughput_ratio": ratio,
            "share": ratio / flop_ratio if ratio and flop_ratio else None,
        })  # fmt: skip
    if not as_json:
        print_line(_describe_protocol(first.device, first.compiled, protocol))
        for row in rows:
            row["quartiles"] = "{:.0f} to {:.0f}".format(*row["img_per_s_quartiles"])
        columns = ["model", "img_per_s", "quartiles", "peak_mem_mb"]
        columns += ["flop_ratio", "throughput_ratio", "share"] if is_comparison else []
        rows = [{key: row[key] for key in columns} for row in rows]
    print_rows(rows, as_json, {"img_per_s": (1, "img/s"), "peak_mem_mb": (1, "peak memory (MB)"),
                          "flop_ratio": (1, "fewer FLOPs"), "throughput_ratio": (1, "faster")})  # fmt: skip


def _measure_table1(patterns: list[str], protocol: Protocol, device: torch.device, folder: Path, as_json: bool) -> None:
    from flopeq.hardware import can_compile, hardware_name
    from flopeq.measure.comparison import measure_table1, results_path, select_rows

    selected = select_rows(patterns)
    path = results_path(folder, protocol, device)
    names = {row.model: row.paper_name for row in selected}
    try:
        with progress_bar() as show:
            rows = measure_table1(selected, protocol, device, path, lambda model, *passes: show(names[model], *passes))
    except KeyboardInterrupt:
        print(f"interrupted: run the same command to resume after the rows in {path}", file=sys.stderr)
        raise
    if as_json:
        print_rows([asdict(row) for row in rows], as_json)
        return
    print_line(_describe_protocol(hardware_name(device), protocol.compile and can_compile(device), protocol))
    print_rows([_table1_columns(row) for row in rows], as_json)
    print_line(f"saved to {path}")


def _table1_columns(row: ComparisonRow) -> dict[str, str]:
    """The printed columns of a row: each measured value, then the paper's."""
    speed = format_cell(row.img_per_s) if row.status == "ok" else row.status
    low, high = row.img_per_s_q1, row.img_per_s_q3
    return {
        "": row.paper_name,
        "params (M)": f"{row.params / 1e6:.1f}",
        "paper": f"{row.paper_params_m:.1f}",
        "GFLOPs": f"{row.flops / 1e9:.1f}",
        "paper ": f"{row.paper_gflops:.1f}",
        "img/s": speed,
        "quartiles": "-" if low is None or high is None else f"{format_cell(low)} to {format_cell(high)}",
        "A100, paper": format_cell(row.paper_img_per_s),
        "peak MB": format_cell(row.peak_mem_mb),
        "paper  ": format_cell(row.paper_peak_mem_mb),
        "fewer FLOPs": format_fixed(row.flop_ratio),
        "faster": format_fixed(row.throughput_ratio),
        "paper   ": format_fixed(row.paper_throughput_ratio),
        "share": format_fixed(row.share),
        "paper    ": format_fixed(row.paper_share),
    }


def _mode_name(protocol: Protocol) -> str:
    return "train" if protocol.train else "forward"


def _describe_protocol(device: str, compiled: bool, protocol: Protocol) -> str:
    """One line that describes the protocol."""
    mode = "training steps" if protocol.train else "passes"
    return (
        f"{device}, {str(protocol.dtype).removeprefix('torch.')}, batch {protocol.batch_size}, "
        f"{'compiled' if compiled else 'eager'}, "
        f"median of {protocol.runs} {mode} after {1 + protocol.warmup} warm-up {mode}"
    )
