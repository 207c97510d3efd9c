"""The commands `list`, `complexity`, `equivariance`, `export`, `symmetrize` and `convert`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flopeq.registry import MODELS

# The commands import torch and timm themselves, so that shell completion does not wait for them.
if TYPE_CHECKING:
    from torch import nn

from flopeq.cli.app import app, format_examples
from flopeq.cli.options import (
    Device,
    ImageSize,
    Json,
    ModelWords,
    check_dtype,
    complete_model,
    input_size,
    parse_model_args,
    select_device,
)
from flopeq.cli.output import print_line, print_rows


@app.command("list", epilog=format_examples("list", "list --json"))
def list_models(as_json: Json = False) -> None:
    """List the models of the paper and their names in timm."""
    rows = [
        {"model": info.model, "paper_name": info.paper_name, "family": info.family, "variant": info.variant}
        for info in MODELS.values()
    ]
    print_rows(rows, as_json)


@app.command(
    epilog=format_examples(
        "complexity deit3_small_patch16_224 flop_deit3_small_patch16_224",
        "complexity flophybrid_deit3_base_patch16_224 num_flop_blocks=4 --json",
        "complexity resnet50 --image-size 160",
    )
)
def complexity(words: ModelWords, image_size: ImageSize = None, as_json: Json = False) -> None:
    """Count parameters and operations per image, in the paper's convention."""
    from flopeq.measure import flops
    from flopeq.models.build import build

    names, args = parse_model_args(words)
    rows = []
    for name in names:
        model = build(name, device="meta", **args)
        rows.append({"model": name, **asdict(flops.complexity(model, input_size(model, args, image_size)))})
    units = {"params": (1e6, "params (M)"), "flops": (1e9, "GFLOPs"), "macs": (1e9, "multiply-adds (G)"),
             "elementwise": (1e9, "element-wise (G)")}  # fmt: skip
    print_rows(rows, as_json, units)


@app.command(
    epilog=format_examples(
        "equivariance flop_deit3_small_patch16_224",
        "equivariance flop_convnext_iso_small num_classes=10 checkpoint_path=weights.safetensors",
        "equivariance flop_resmlp_24_224 --dtype float32 --json",
        "equivariance octic_deit3_small_patch16_224 symmetry=d4:6,c2:6",
    )
)
def equivariance(
    words: ModelWords,
    device: Device = "cpu",
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", callback=check_dtype, help="Precision of weights and images.")
    ] = "float64",
    seed: Annotated[int, typer.Option(help="Seed of weights and images.")] = 0,
    group: Annotated[
        str | None,
        typer.Option(
            metavar="GROUP",
            help="Symmetries to try: flop, c2xc2, d4, or others of the square. The default is the group of the model's "
            "first block, and the flop for models without one.",
        ),
    ] = None,
    image_size: ImageSize = None,
    as_json: Json = False,
) -> None:
    """Measure the equivariance error of the logits and of every block's features, under each symmetry.

    The command compares two random images with their flops, or with their copies under a larger group. Errors are
    relative to the largest value. For an equivariant network they are rounding errors. Freshly initialized weights are
    partly zero, so noise is added to them; weights from checkpoint_path=FILE are used unchanged.
    """
    import torch

    from flopeq.groups import TRIVIAL
    from flopeq.models.build import build
    from flopeq.testing import errors_by_symmetry, largest_error, network_group

    names, args = parse_model_args(words)
    torch_device = select_device(device)
    rows = []
    for name in names:
        torch.manual_seed(seed)
        model = build(name, **args).eval().to(torch_device, getattr(torch, dtype))
        if "checkpoint_path" not in args:
            _add_noise(model)
        size = input_size(model, args, image_size)
        images_BCHW = torch.randn(2, *size).to(torch_device, getattr(torch, dtype))
        own_group = network_group(model)
        tried = group or ("flop" if own_group is TRIVIAL else own_group.name)
        errors = {
            part: {str(g): error for g, error in by_symmetry.items()}
            for part, by_symmetry in errors_by_symmetry(model, images_BCHW, tried).items()
        }
        largest = {part: largest_error(by_symmetry.values()) for part, by_symmetry in errors.items()}
        rows.append({"model": name, "max_rel_error": largest.pop("logits"), "blocks": largest, "symmetries": errors})
    if as_json:
        print_rows(rows, as_json)
        return
    for row in rows:
        print_line(row["model"])
        parts = {"logits": row["symmetries"].pop("logits")} | row["symmetries"]
        table = [
            {"": part, **{g: f"{errors[g]:.1e}" if g in errors else "" for g in parts["logits"]}}
            for part, errors in parts.items()
        ]
        print_rows(table, as_json)


ExportWords = Annotated[
    list[str],
    typer.Argument(metavar="[MODEL] OUT_DIR [KEY=VALUE...]", help="A timm model, the folder to write, and model "
                   "arguments. Omit MODEL with --run.", autocompletion=complete_model),
]  # fmt: skip

Checkpoint = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Weights; convert the authors' with `flopeq convert` first.")
]

TrainedRun = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="A trained run, outputs/<run>: its model, weights, metrics.")
]

License = Annotated[str, typer.Option(metavar="NAME", help="License of the weights.")]


@app.command(
    epilog=format_examples(
        "export flop_deit3_small_patch16_224 exported --checkpoint weights.safetensors",
        "export --run outputs/e-vit exported/e-vit",
    )
)
def export(
    words: ExportWords,
    checkpoint: Checkpoint = None,
    run: TrainedRun = None,
    license: License = "apache-2.0",
    as_json: Json = False,
) -> None:
    """Export a model to a folder that timm loads: model.safetensors, config.json and a model card, README.md.

    After `import flopeq`, timm.create_model("local-dir:OUT_DIR", pretrained=True) loads the model. The folder can be
    uploaded to a model hub as it is. The export measures the equivariance error for the model card.
    """
    _export(words, as_json, checkpoint=checkpoint, run=run, license=license)


@app.command(
    epilog=format_examples(
        "symmetrize --run outputs/vit symmetrized/vit",
        "symmetrize resnet50 symmetrized/resnet50 --checkpoint weights.safetensors --group d4 --how canonical",
    )
)
def symmetrize(
    words: ExportWords,
    group: Annotated[
        str, typer.Option(metavar="NAME", help="flop, flip, turn, transpose, c4, d4, or names joined by *.")
    ] = "flop",
    how: Annotated[
        str, typer.Option(metavar="HOW", help="average, choose (the most confident pass), or canonical (one pass).")
    ] = "average",
    checkpoint: Checkpoint = None,
    run: TrainedRun = None,
    license: License = "apache-2.0",
    as_json: Json = False,
) -> None:
    """Make a model invariant under a group, without training, and export it like `flopeq export`.

    The model runs once for each symmetry in the group, or once with `--how canonical`. After `import flopeq`,
    timm.create_model("local-dir:OUT_DIR", pretrained=True) loads it.
    """
    symmetrization = {"group": group, "how": how}
    _export(words, as_json, checkpoint=checkpoint, run=run, license=license, symmetrization=symmetrization)


def _export(words: list[str], as_json: bool, **options: Any) -> None:
    """Exports the model that the words of a command name, and prints the result."""
    from flopeq.hub.export import export_model

    paths = [word for word in words if "=" not in word]
    args = parse_model_args(["-", *(word for word in words if "=" in word)])[1]
    if len(paths) != 2 and not (options["run"] and len(paths) == 1):
        raise ValueError("give MODEL OUT_DIR, or --run FOLDER OUT_DIR")
    name = paths[0] if len(paths) == 2 else None
    print_rows([asdict(export_model(name, Path(paths[-1]), **options, **args))], as_json)


@app.command(
    epilog=format_examples(
        "convert checkpoint.pth flop_deit3_huge_patch14_224 weights.safetensors",
        "convert hybrid.pth octichybrid_deit3_huge_patch14_224 weights.safetensors",
    )
)
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN.pth", help="A checkpoint of the paper's authors.")],
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The name of its model in flopeq.", autocompletion=complete_model)
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The file to write.")],
    as_json: Json = False,
) -> None:
    """Convert a checkpoint from the authors' repository to one that flopeq's model loads.

    DeiT III checkpoints of their octic-vits convert to octichybrid_* models.
    """
    from flopeq.hub.convert import convert_checkpoint

    tensors = convert_checkpoint(source, model, target)
    row = {"model": model, "tensors": len(tensors), "params": sum(t.numel() for t in tensors.values()),
           "file": str(target)}  # fmt: skip
    print_rows([row], as_json)


def _add_noise(model: nn.Module) -> None:
    """Adds Gaussian noise with standard deviation 0.02 to every parameter."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
