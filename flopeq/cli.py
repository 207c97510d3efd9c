"""The command line: `flopeq list | complexity | throughput | equivariance | convert`."""

from __future__ import annotations

import ast
import json
import logging
import sys
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import flopeq  # noqa: F401  registers our models
from flopeq.benchmark import gain, protocol_for
from flopeq.benchmark import throughput as measure
from flopeq.build import build
from flopeq.convert import convert_checkpoint
from flopeq.flops import complexity as count
from flopeq.registry import MODELS
from flopeq.testing import block_errors, equivariance_error

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Image networks that commute with horizontal mirroring, at half the FLOPs.",
)  # fmt: skip

Words = Annotated[
    list[str],
    typer.Argument(metavar="MODEL... [KEY=VALUE...]", help="timm models; arguments that all of them take"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ImageSize = Annotated[int | None, typer.Option(help="Side of the square images; default: the model's own.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU where there is one.")]


class Dtype(StrEnum):
    """Floating-point types by the names that torch gives them."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"
    float64 = "float64"


def main(words: list[str] | None = None) -> None:
    """Runs one command; a mistake of the user's is one line on stderr and exit code 2."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        app(args=words)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """List the paper's networks and their names in timm."""
    rows = [
        {"model": info.model, "paper_name": info.paper_name, "family": info.family, "variant": info.variant}
        for info in MODELS.values()
    ]
    _show(rows, as_json)


@app.command()
def complexity(words: Words, image_size: ImageSize = None, as_json: Json = False) -> None:
    """Count parameters and operations per image, in the paper's convention."""
    names, args = parse(words)
    rows = []
    for name in names:
        model = build(name, device="meta", **args)
        rows.append({"model": name, **asdict(count(model, _input_size(model, args, image_size)))})
    units = {"params": (1e6, "params (M)"), "flops": (1e9, "GFLOPs"), "macs": (1e9, "multiply-adds (G)"),
             "elementwise": (1e9, "element-wise (G)")}  # fmt: skip
    _show(rows, as_json, units)


@app.command()
def throughput(
    words: Words,
    device: Device = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per pass.")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Untimed passes per model.")] = None,
    runs: Annotated[int | None, typer.Option(min=1, help="Timed passes per model.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Autocast type; float32: no autocast.")] = None,
    compile: Annotated[bool, typer.Option(help="Measure through torch.compile.")] = True,
    image_size: ImageSize = None,
    as_json: Json = False,
) -> None:
    """Measure forward throughput and peak memory, the models taking turns.

    On a GPU by the paper's protocol: batch 64, compiled, float16 autocast, 10 warm-up and 100 timed passes.
    On a CPU the same with smaller counts in float32.
    """
    names, args = parse(words)
    on = _device(device)
    amp = None if dtype is None else getattr(torch, dtype)
    given = {"batch_size": batch_size, "warmup": warmup, "runs": runs, "dtype": amp}
    given = {key: value for key, value in given.items() if value is not None}
    protocol = replace(protocol_for(on), compile=compile, **given)
    models = {name: build(name, **args) for name in names}
    sizes = {_input_size(model, args, image_size) for model in models.values()}
    if len(sizes) > 1:
        raise ValueError(f"the models take images of different sizes, {sorted(sizes)}: give --image-size")
    results = measure(models, image_size=sizes.pop(), device=on, **asdict(protocol))
    first = results[names[0]]
    rows = [
        {
            "model": name, "device": result.device, "dtype": result.dtype, "batch_size": result.batch_size,
            "img_per_s": result.img_per_s, "img_per_s_quartiles": result.img_per_s_quartiles,
            "peak_mem_mb": result.peak_mem_mb, "compiled": result.compiled, "runs": result.runs,
        }
        for name, result in results.items()
    ]  # fmt: skip
    if not as_json:
        how = "compiled" if first.compiled else "eager"
        _say(
            f"{first.device}, {first.dtype}, batch {first.batch_size}, {how}, median of {first.runs} passes "
            f"after {1 + protocol.warmup} to warm up"
        )
        for row, result in zip(rows, results.values(), strict=True):
            row["quartiles"] = "{:.0f} to {:.0f}".format(*result.img_per_s_quartiles)
            row[f"over {names[0]}"] = f"{gain(result, first):.3f}"
        kept = ("model", "img_per_s", "quartiles", "peak_mem_mb", f"over {names[0]}")
        rows = [{key: row[key] for key in kept} for row in rows]
    _show(rows, as_json, {"img_per_s": (1, "img/s"), "peak_mem_mb": (1, "peak memory (MB)")})


@app.command()
def equivariance(
    words: Words,
    device: Device = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Precision of weights and images.")] = Dtype.float64,
    seed: Annotated[int, typer.Option(help="Seed of weights and images.")] = 0,
    image_size: ImageSize = None,
    as_json: Json = False,
) -> None:
    """Compare the logits of images with those of their flops, and every block's features likewise.

    Errors are relative to the largest value; those of an equivariant network are rounding errors. Noise is
    added to fresh weights, which are zero in places; those of checkpoint_path=FILE are taken as they are.
    """
    names, args = parse(words)
    on = _device(device)
    rows = []
    for name in names:
        torch.manual_seed(seed)
        model = build(name, **args).eval().to(on, getattr(torch, dtype))
        if "checkpoint_path" not in args:
            _perturb(model)
        size = _input_size(model, args, image_size)
        images_BCHW = torch.randn(2, *size).to(on, getattr(torch, dtype))
        rows.append(
            {
                "model": name,
                "max_rel_error": equivariance_error(model, images_BCHW),
                "blocks": block_errors(model, images_BCHW),
            }
        )
    if as_json:
        _show(rows, as_json)
        return
    for row in rows:
        errors = {"logits": row["max_rel_error"]} | row["blocks"]
        _say(row["model"])
        _show([{"": part, "error": f"{error:.1e}"} for part, error in errors.items()], as_json)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN.pth", help="A checkpoint of the authors.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Our name of its model.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="What to write.")],
    as_json: Json = False,
) -> None:
    """Turn a checkpoint of the authors' repository into one that our model loads."""
    tensors = convert_checkpoint(source, model, target)
    row = {"model": model, "tensors": len(tensors), "params": sum(t.numel() for t in tensors.values()),
           "file": str(target)}  # fmt: skip
    _show([row], as_json)


def parse(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Splits model names from `key=value` arguments, whose values are Python literals or else strings."""
    names = list(dict.fromkeys(word for word in words if "=" not in word))
    if not names:
        raise ValueError("name at least one model; `flopeq list` shows the paper's")
    pairs = [word.partition("=") for word in words if "=" in word]
    return names, {key: _value(text) for key, _, text in pairs}


def _value(text: str) -> Any:
    named = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _input_size(model: nn.Module, args: dict[str, Any], side: int | None) -> tuple[int, int, int]:
    """(C, H, W) of what a model takes: as asked for, else as its arguments say, else its default."""
    channels, height, width = getattr(model, "pretrained_cfg")["input_size"]  # noqa: B009  timm sets it
    asked = side or args.get("img_size") or (height, width)
    height, width = (asked, asked) if isinstance(asked, int) else asked
    return args.get("in_chans", channels), height, width


@torch.no_grad()
def _perturb(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.02)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"no device is called {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, and there is no GPU: use --device cpu")
    return device


def _say(line: str) -> None:
    _console().print(line, highlight=False, soft_wrap=True)


def _console() -> Console:
    """As wide as the terminal, and wide enough for every table where there is none."""
    return Console(width=None if sys.stdout.isatty() else 160)


def _show(
    rows: list[dict[str, Any]], as_json: bool, units: dict[str, tuple[float, str]] | None = None
) -> None:
    """Prints rows as JSON, or as a table in which `units` gives a column's divisor and heading."""
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    units = units or {}
    table = Table(box=box.SIMPLE_HEAD)
    for key in rows[0]:
        is_text = isinstance(rows[0][key], str)
        table.add_column(units.get(key, (1, key))[1], justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value, units.get(key, (1, key))[0]) for key, value in row.items()))
    _console().print(table)


def _cell(value: Any, divisor: float) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    value = value / divisor
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
