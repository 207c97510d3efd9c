"""Options and arguments shared by several commands."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flopeq.registry import MODELS

# The commands import torch and timm themselves, so that shell completion does not wait for them.
if TYPE_CHECKING:
    import torch
    from torch import nn


DTYPES = ("float16", "bfloat16", "float32", "float64")


def complete_model(incomplete: str) -> list[str]:
    return [name for name in MODELS if name.startswith(incomplete)]


def check_dtype(name: str | None) -> str | None:
    if name is not None and name not in DTYPES:
        from flopeq.models.build import did_you_mean

        raise ValueError(f"unknown dtype {name!r}{did_you_mean(name, DTYPES)}; use one of {', '.join(DTYPES)}")
    return name


MODELS_ARGUMENT = typer.Argument(
    metavar="MODEL... [KEY=VALUE...]", help="timm models, and model arguments that apply to all of them.",
    autocompletion=complete_model,
)  # fmt: skip

ModelWords = Annotated[list[str], MODELS_ARGUMENT]

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

ImageSize = Annotated[
    int | None, typer.Option(min=1, help="Side of the square images. Default: the model's image size.")
]

Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: the GPU if there is one.")]

BatchSize = Annotated[int | None, typer.Option(min=1, help="Images per pass.")]

Autocast = Annotated[
    str | None, typer.Option(metavar="DTYPE", callback=check_dtype, help="Autocast dtype. float32 turns autocast off.")
]

FusedAttention = Annotated[bool, typer.Option(help="Use timm's fused attention.")]


def parse_model_args(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Separates model names from `key=value` arguments. Values are Python literals, or else strings."""
    names = list(dict.fromkeys(word for word in words if "=" not in word))
    if not names:
        raise ValueError("name at least one model; `flopeq list` shows the paper's")
    pairs = [word.partition("=") for word in words if "=" in word]
    return names, {key: _parse_value(text) for key, _, text in pairs}


def _parse_value(text: str) -> Any:
    named = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def input_size(model: nn.Module, args: dict[str, Any], side: int | None) -> tuple[int, int, int]:
    """(C, H, W) of the images: from the option, else from the model's arguments, else the model's default."""
    channels, height, width = getattr(model, "pretrained_cfg")["input_size"]  # noqa: B009  timm sets it
    size = side or args.get("img_size") or (height, width)
    height, width = (size, size) if isinstance(size, int) else size
    return args.get("in_chans", channels), height, width


def select_device(name: str | None) -> torch.device:
    """The named device, else a GPU if there is one, else the CPU. On a CPU, also turns on `keep_freed_memory`."""
    import torch

    from flopeq.backends.malloc import keep_freed_memory

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        from flopeq.models.build import did_you_mean

        raise ValueError(f"unknown device {name!r}{did_you_mean(str(name), ('cpu', 'cuda', 'mps'))}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not available, because there is no GPU: use --device cpu")
    if device.type == "cpu":
        keep_freed_memory()
    return device
