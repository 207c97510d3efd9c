"""The command line: `flopeq list | complexity | throughput | profile | equivariance | export | convert`."""

from __future__ import annotations

import ast
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from flopeq.registry import MODELS

# Torch and timm are imported by the commands: a shell that completes a line does not wait for them.
if TYPE_CHECKING:
    import torch
    from torch import nn

    from flopeq.benchmark import Protocol
    from flopeq.comparison import Row

DTYPES = ("float16", "bfloat16", "float32", "float64")

app = typer.Typer(
    no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode="markdown",
    help="Image networks that commute with horizontal mirroring, at half the FLOPs.",
    epilog="Every command has --help with examples, and --json. Exit codes: 0 done; 2 a mistake in what was asked "
    "for, said in one line on stderr; 130 interrupted.",
)  # fmt: skip


def _examples(*lines: str) -> str:
    return "\n".join(("Examples:\n", *(f"- flopeq {line}" for line in lines)))


def _complete_model(incomplete: str) -> list[str]:
    return [name for name in MODELS if name.startswith(incomplete)]


def _dtype(name: str | None) -> str | None:
    if name is not None and name not in DTYPES:
        from flopeq.build import nearest

        raise ValueError(f"no dtype is called {name!r}{nearest(name, DTYPES)}; there are {', '.join(DTYPES)}")
    return name


_MODELS = typer.Argument(
    metavar="MODEL... [KEY=VALUE...]", help="timm models; arguments that all of them take.",
    autocompletion=_complete_model,
)  # fmt: skip
Words = Annotated[list[str], _MODELS]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Side of the square images; default: the model's own.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU where there is one.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Images per pass.")]
Autocast = Annotated[
    str | None, typer.Option(metavar="DTYPE", callback=_dtype, help="Autocast type; float32: no autocast.")
]
FusedAttention = Annotated[bool, typer.Option(help="One fused operation for attention, as timm does it.")]


def main(words: list[str] | None = None) -> None:
    """Runs one command; a mistake of the user's is one line on stderr and exit code 2."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        app(args=words)
    except (ValueError, OSError) as error:
        fail(error)
    except RuntimeError as error:
        from flopeq.benchmark import OutOfMemory

        if not isinstance(error, OutOfMemory):
            raise
        fail(error)


def fail(error: Exception) -> None:
    """The end of a command that could not do what was asked for."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


@app.command("list", epilog=_examples("list", "list --json"))
def list_models(as_json: Json = False) -> None:
    """List the paper's networks and their names in timm."""
    rows = [
        {"model": info.model, "paper_name": info.paper_name, "family": info.family, "variant": info.variant}
        for info in MODELS.values()
    ]
    _show(rows, as_json)


@app.command(
    epilog=_examples(
        "complexity deit3_small_patch16_224 flop_deit3_small_patch16_224",
        "complexity flophybrid_deit3_base_patch16_224 num_flop_blocks=4 --json",
        "complexity resnet50 --image-size 160",
    )
)
def complexity(words: Words, image_size: ImageSize = None, as_json: Json = False) -> None:
    """Count parameters and operations per image, in the paper's convention."""
    from flopeq.build import build
    from flopeq.flops import complexity as count

    names, args = parse(words)
    rows = []
    for name in names:
        model = build(name, device="meta", **args)
        rows.append({"model": name, **asdict(count(model, _input_size(model, args, image_size)))})
    units = {"params": (1e6, "params (M)"), "flops": (1e9, "GFLOPs"), "macs": (1e9, "multiply-adds (G)"),
             "elementwise": (1e9, "element-wise (G)")}  # fmt: skip
    _show(rows, as_json, units)


@app.command(
    epilog=_examples(
        "throughput deit3_small_patch16_224 flop_deit3_small_patch16_224",
        "throughput flop_convnext_iso_base --train --batch-size 32 --dtype bfloat16",
        "throughput --table1",
        "throughput --table1 --rows S --rows 'E(ViT-B)' --json",
    )
)
def throughput(
    words: Annotated[list[str] | None, _MODELS] = None,
    table1: Annotated[bool, typer.Option("--table1", help="Measure the rows of the paper's Table 1 instead.")] = False,
    rows: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="With --table1: only these rows, by size (S), family (vit), name (ViT-*, "
                     "'E(ViT-S)') or model, and the X they are compared with. May be given again."),
    ] = None,
    results: Annotated[Path, typer.Option(help="With --table1: the folder that keeps what was measured.")] = Path(
        "results"
    ),
    train: Annotated[bool, typer.Option("--train", help="Training steps: forward, backward, AdamW.")] = False,
    device: Device = None,
    batch_size: BatchSize = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Untimed passes per model.")] = None,
    runs: Annotated[int | None, typer.Option(min=1, help="Timed passes per model.")] = None,
    dtype: Autocast = None,
    compile: Annotated[bool, typer.Option(help="Measure through torch.compile.")] = True,
    fused_attention: FusedAttention = True,
    image_size: ImageSize = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure throughput and peak memory, the models taking turns.

    On a GPU by the paper's protocol: batch 64, compiled, float16 autocast, 10 warm-up and 100 timed passes.
    On a CPU the same with smaller counts in float32. Several models are compared with the first.

    --table1 prints the paper's Table 1 with our figures beside the paper's, and keeps them as CSV in results/, one
    file per device, dtype and versions. Rows that are there are not measured again, so that a measurement that was
    interrupted goes on; remove the file to start over. A network that does not fit into memory has its row, which
    says so.
    """
    import timm
    import torch

    from flopeq.benchmark import protocol_for

    on = _device(device)
    given = {"batch_size": batch_size, "warmup": warmup, "runs": runs, "dtype": dtype and getattr(torch, dtype)}
    given = {key: value for key, value in given.items() if value is not None}
    protocol = replace(protocol_for(on), compile=compile, train=train, **given)
    if not fused_attention:
        timm.layers.set_fused_attn(False)
    if table1:
        if words or image_size:
            raise ValueError("--table1 measures the paper's models at the paper's size: choose among them with --rows")
        _table1(rows or [], protocol, on, results, as_json)
    elif rows:
        raise ValueError("--rows chooses among the rows of --table1")
    else:
        _throughput(words or [], protocol, on, image_size, as_json)


def _throughput(
    words: list[str], protocol: Protocol, device: torch.device, side: int | None, as_json: bool
) -> None:
    from flopeq.benchmark import gain
    from flopeq.benchmark import throughput as measure
    from flopeq.build import build
    from flopeq.flops import complexity as count

    names, args = parse(words)
    models = {name: build(name, **args) for name in names}
    sizes = {_input_size(model, args, side) for model in models.values()}
    if len(sizes) > 1:
        raise ValueError(f"the models take images of different sizes, {sorted(sizes)}: give --image-size")
    [size] = sizes
    several = len(names) > 1
    flops = {name: count(build(name, device="meta", **args), size).flops for name in names if several}
    with _progress() as tell:
        measured = measure(models, image_size=size, device=device, tell=tell, **asdict(protocol))
    first = measured[names[0]]
    rows = []
    for name, result in measured.items():
        flop_ratio = flops[names[0]] / flops[name] if several else None
        ratio = gain(result, first) if several else None
        rows.append({
            "model": name, "device": result.device, "dtype": result.dtype, "batch_size": result.batch_size,
            "mode": _mode(protocol), "img_per_s": result.img_per_s, "img_per_s_quartiles": result.img_per_s_quartiles,
            "peak_mem_mb": result.peak_mem_mb, "compiled": result.compiled, "first_pass_s": result.first_pass_s,
            "runs": result.runs, "flop_ratio": flop_ratio, "throughput_ratio": ratio,
            "share": ratio / flop_ratio if ratio and flop_ratio else None,
        })  # fmt: skip
    if not as_json:
        _say(_how(first.device, first.compiled, protocol))
        for row in rows:
            row["quartiles"] = "{:.0f} to {:.0f}".format(*row["img_per_s_quartiles"])
        kept = ["model", "img_per_s", "quartiles", "peak_mem_mb"]
        kept += ["flop_ratio", "throughput_ratio", "share"] if several else []
        rows = [{key: row[key] for key in kept} for row in rows]
    _show(rows, as_json, {"img_per_s": (1, "img/s"), "peak_mem_mb": (1, "peak memory (MB)"),
                          "flop_ratio": (1, "fewer FLOPs"), "throughput_ratio": (1, "faster")})  # fmt: skip


def _table1(
    patterns: list[str], protocol: Protocol, device: torch.device, folder: Path, as_json: bool
) -> None:
    from flopeq.benchmark import can_compile, hardware_name
    from flopeq.comparison import compare, results_path, select

    wanted = select(patterns)
    path = results_path(folder, protocol, device)
    names = {row.model: row.paper_name for row in wanted}
    try:
        with _progress() as tell:
            rows = compare(wanted, protocol, device, path, lambda model, *passes: tell(names[model], *passes))
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on after the rows in {path}", file=sys.stderr)
        raise
    if as_json:
        _show([asdict(row) for row in rows], as_json)
        return
    _say(_how(hardware_name(device), protocol.compile and can_compile(device), protocol))
    _show([_beside_the_papers(row) for row in rows], as_json)
    _say(f"kept in {path}")


def _beside_the_papers(row: Row) -> dict[str, str]:
    """A row for people: ours, then the paper's, by column."""
    speed = _cell(row.img_per_s) if row.status == "ok" else row.status
    low, high = row.img_per_s_q1, row.img_per_s_q3
    return {
        "": row.paper_name,
        "params (M)": f"{row.params / 1e6:.1f}",
        "paper": f"{row.paper_params_m:.1f}",
        "GFLOPs": f"{row.flops / 1e9:.1f}",
        "paper ": f"{row.paper_gflops:.1f}",
        "img/s": speed,
        "quartiles": "-" if low is None or high is None else f"{_cell(low)} to {_cell(high)}",
        "A100, paper": _cell(row.paper_img_per_s),
        "peak MB": _cell(row.peak_mem_mb),
        "paper  ": _cell(row.paper_peak_mem_mb),
        "fewer FLOPs": _fixed(row.flop_ratio),
        "faster": _fixed(row.throughput_ratio),
        "paper   ": _fixed(row.paper_throughput_ratio),
        "share": _fixed(row.share),
        "paper    ": _fixed(row.paper_share),
    }


def _mode(protocol: Protocol) -> str:
    return "train" if protocol.train else "forward"


def _how(device: str, compiled: bool, protocol: Protocol) -> str:
    """The protocol in one line."""
    mode = "training steps" if protocol.train else "passes"
    return (
        f"{device}, {str(protocol.dtype).removeprefix('torch.')}, batch {protocol.batch_size}, "
        f"{'compiled' if compiled else 'eager'}, "
        f"median of {protocol.runs} {mode} after {1 + protocol.warmup} to warm up"
    )


@app.command(
    epilog=_examples(
        "profile deit3_small_patch16_224 flop_deit3_small_patch16_224",
        "profile flop_convnext_iso_base --no-compile --trace traces",
    )
)
def profile(
    words: Words,
    device: Device = None,
    batch_size: BatchSize = None,
    runs: Annotated[int, typer.Option(min=1, help="Passes under the profiler.")] = 5,
    dtype: Autocast = None,
    compile: Annotated[bool, typer.Option(help="Profile what torch.compile makes, too.")] = True,
    fused_attention: FusedAttention = True,
    image_size: ImageSize = None,
    trace: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write Chrome traces there.")] = None,
    as_json: Json = False,
) -> None:
    """Show where the time of a forward pass goes, by kind of layer: eager, and compiled.

    Kinds are linear, attention, norm, activation, convolution, change of basis, and other. A fused kernel of the
    compiled network is named by all the kinds that it holds: how long each of them takes in it, nobody can say.
    """
    import timm
    import torch

    from flopeq.benchmark import can_compile, protocol_for
    from flopeq.build import build
    from flopeq.profiling import profile as measure

    names, args = parse(words)
    on = _device(device)
    defaults = protocol_for(on)
    if not fused_attention:
        timm.layers.set_fused_attn(False)
    modes = ["eager", "compiled"] if compile and can_compile(on) else ["eager"]
    if compile and len(modes) == 1:
        print("torch.compile needs a C++ compiler and Python's headers, not found: eager only", file=sys.stderr)
    profiles = []
    with _progress() as tell:
        for number, name in enumerate(names):
            model = build(name, **args)
            for place, mode in enumerate(modes):
                tell(f"{name}, {mode}", number * len(modes) + place, len(names) * len(modes))
                file = None if trace is None else trace / f"{name}-{mode}.json"
                profiles.append(
                    measure(
                        model, name, image_size=_input_size(model, args, image_size), device=on, runs=runs,
                        batch_size=batch_size or defaults.batch_size, compiled=mode == "compiled", trace=file,
                        dtype=getattr(torch, dtype) if dtype else defaults.dtype,
                    )
                )  # fmt: skip
    if as_json:
        _show([asdict(one) for one in profiles], as_json)
        return
    first = profiles[0]
    _say(f"{first.device}, {first.dtype}, batch {first.batch_size}, ms a forward pass, median of {runs} passes")
    for name in names:
        _say(f"\n{name}")
        ours = [one for one in profiles if one.model == name]
        kinds = list(dict.fromkeys(kind for one in ours for kind in one.kinds))
        table = []
        for kind in [*kinds, "sum", "a pass, without the profiler"]:
            row: dict[str, Any] = {"": kind}
            for one in ours:
                ms = {"sum": one.sum_ms, "a pass, without the profiler": one.pass_ms}.get(kind, one.kinds.get(kind))
                row[f"{one.mode} (ms)"] = _fixed(ms)
                row[f"{one.mode} (%)"] = _fixed(None if ms is None else 100 * ms / one.sum_ms, 1)
            table.append(row)
        _show(table, as_json)
        for one in ours:
            if one.trace:
                _say(f"trace: {one.trace}")


@app.command(
    epilog=_examples(
        "equivariance flop_deit3_small_patch16_224",
        "equivariance flop_convnext_iso_small num_classes=10 checkpoint_path=weights.safetensors",
        "equivariance flop_resmlp_24_224 --dtype float32 --json",
    )
)
def equivariance(
    words: Words,
    device: Device = "cpu",
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", callback=_dtype, help="Precision of weights and images.")
    ] = "float64",
    seed: Annotated[int, typer.Option(help="Seed of weights and images.")] = 0,
    image_size: ImageSize = None,
    as_json: Json = False,
) -> None:
    """Compare the logits of images with those of their flops, and every block's features likewise.

    Errors are relative to the largest value; those of an equivariant network are rounding errors. Noise is
    added to fresh weights, which are zero in places; those of checkpoint_path=FILE are taken as they are.
    """
    import torch

    from flopeq.build import build
    from flopeq.testing import block_errors, equivariance_error

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


@app.command(
    epilog=_examples(
        "export flop_deit3_small_patch16_224 exported --checkpoint weights.safetensors",
        "export --run outputs/e-vit exported/e-vit",
    )
)
def export(
    words: Annotated[
        list[str],
        typer.Argument(metavar="[MODEL] OUT_DIR [KEY=VALUE...]", help="A timm model, the folder to write, arguments "
                       "of the model. --run says the model itself.", autocompletion=_complete_model),
    ],
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Weights; the authors' go through `flopeq convert` first.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A trained run, outputs/<run>: its model, weights, figures.")
    ] = None,
    license: Annotated[str, typer.Option(metavar="NAME", help="Licence of the weights.")] = "apache-2.0",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write a folder that timm loads: model.safetensors, config.json, and a model card, README.md.

    After `import flopeq`, timm.create_model("local-dir:OUT_DIR", pretrained=True) is the same network, and the folder
    can be uploaded to a model hub as it is. The card's equivariance error is measured while it is written.
    """
    from flopeq.export import export as write

    paths = [word for word in words if "=" not in word]
    args = parse(["-", *(word for word in words if "=" in word)])[1]
    if len(paths) != 2 and not (run and len(paths) == 1):
        raise ValueError("say MODEL OUT_DIR, or --run FOLDER OUT_DIR")
    name = paths[0] if len(paths) == 2 else None
    written = write(name, Path(paths[-1]), checkpoint=checkpoint, run=run, license=license, **args)
    _show([asdict(written)], as_json)


@app.command(epilog=_examples("convert checkpoint.pth flop_deit3_huge_patch14_224 weights.safetensors"))
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN.pth", help="A checkpoint of the authors.")],
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Our name of its model.", autocompletion=_complete_model)
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="What to write.")],
    as_json: Json = False,
) -> None:
    """Turn a checkpoint of the authors' repository into one that our model loads."""
    from flopeq.convert import convert_checkpoint

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


def _perturb(model: nn.Module) -> None:
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)


def _device(name: str | None) -> torch.device:
    """Where networks run: as asked for, or a GPU if there is one. A process on a CPU keeps freed memory for them."""
    import torch

    from flopeq.malloc import keep_freed_memory

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        from flopeq.build import nearest

        raise ValueError(f"no device is called {name!r}{nearest(str(name), ('cpu', 'cuda', 'mps'))}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, and there is no GPU: use --device cpu")
    if device.type == "cpu":
        keep_freed_memory()
    return device


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, gone when all is done, and never there off a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # It draws when it is told something: a thread that draws ten times a second would be measured with the models.
    with Progress(
        *columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total, refresh=True)


def _say(line: str) -> None:
    _console().print(line, highlight=False, soft_wrap=True)


def _console() -> Console:
    """As wide as the terminal, and wide enough for every table where there is none."""
    return Console(width=None if sys.stdout.isatty() else 180)


def _show(
    rows: list[dict[str, Any]], as_json: bool, units: dict[str, tuple[float, str]] | None = None
) -> None:
    """Prints rows as JSON, or as a table in which `units` gives a column's divisor and heading."""
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    units = units or {}
    table = Table(box=box.SIMPLE_HEAD)
    for number, key in enumerate(rows[0]):
        is_text = number == 0 or any(isinstance(row[key], str) and not _is_number(row[key]) for row in rows)
        table.add_column(units.get(key, (1, key))[1].strip(), justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value, units.get(key, (1, key))[0]) for key, value in row.items()))
    _console().print(table)


def _is_number(text: str) -> bool:
    return text == "-" or text.replace(",", "").replace(".", "", 1).isdigit()


def _cell(value: Any, divisor: float = 1) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    value = value / divisor
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _fixed(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
