"""A model as a folder that timm loads: safetensors, config.json, and a card whose figures are measured on the spot."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.models import load_checkpoint, save_for_hf
from torch import nn

from flopeq.build import build
from flopeq.card import TrainedRun, card, failure
from flopeq.flops import complexity
from flopeq.registry import describe
from flopeq.testing import equivariance_error
from flopeq.variants import baseline_of


@dataclass(frozen=True)
class Exported:
    """What `export` wrote, and measured."""

    model: str
    folder: str
    params: int
    flops: int
    equivariance_error: float


def read_run(folder: Path) -> TrainedRun:
    """A run's files. Raises: ValueError for a folder that is none of a trained run."""
    import yaml  # timm requires it

    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is no trained run: it has no config.yaml, as outputs/<run> has")
    read = {}
    for name in ("metrics.json", "run.json"):
        path = folder / name
        read[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    metrics, notes = read["metrics.json"], read["run.json"]
    return TrainedRun(config, metrics, notes, failure(notes, metrics))


def export(
    name: str | None,
    folder: Path,
    *,
    checkpoint: Path | None = None,
    run: Path | None = None,
    license: str = "apache-2.0",
    **args: Any,
) -> Exported:
    """Writes a model into a folder in timm's hub layout: model.safetensors, config.json and the card, README.md.

    `run` is a trained run's folder, which says model, arguments, weights and preprocessing; `checkpoint` a file of
    weights, safetensors or torch's; with `run`, another one in its folder, such as the averaged weights. Without
    either the weights are random. Arguments that the checkpoint shows (those that `flopeq convert` notes, and the
    number of classes) need not be given.
    Raises: ValueError for a model, arguments or weights that do not fit each other.
    """
    trained = None if run is None else read_run(run)
    if run and trained:
        if name not in (None, trained.config["model"]):
            raise ValueError(f"{run} is a run of {trained.config['model']}, not of {name}")
        name, args = trained.config["model"], trained.config["args"] | args
        checkpoint = checkpoint or run / "weights.safetensors"
        if checkpoint.resolve().parent != run.resolve():
            raise ValueError(f"{checkpoint} is not in {run}, whose accuracies the card has: leave one of them out")
    assert name is not None
    if checkpoint:
        args = _shown_by(checkpoint, name) | args
    torch.manual_seed(0)
    model = build(name, **args).eval()
    if checkpoint:
        _load(model, name, checkpoint)
    data = None
    if trained:
        used = trained.config["data"]
        data = {"input_size": (3, used["image_size"], used["image_size"]), "mean": tuple(used["mean"]),
                "std": tuple(used["std"]), "interpolation": used["interpolation"],
                "crop_pct": trained.config["recipe"]["test_crop_ratio"]}  # fmt: skip
    try:
        save_for_hf(model, str(folder), safe_serialization=True, data_config=data,
                    model_config={"pretrained_cfg": {"license": license}})  # fmt: skip
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error}") from error
    size = tuple(json.loads((folder / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]["input_size"])
    counted = complexity(build(name, device="meta", **args), size)
    error = measured_error(model, size)
    numbers = {
        "complexity/params_m": counted.params / 1e6,
        "complexity/gflops": counted.flops / 1e9,
        "complexity/gmacs": counted.macs / 1e9,
        "complexity/flop_ratio": _flop_ratio(name, args, size, counted.flops),
        "equivariance/float64_error": error,
    }
    weights = f"those of `{checkpoint.name}`" if checkpoint else "random, untrained"
    text = card(name, args, size, numbers, weights=weights, license=license, run=trained)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return Exported(name, str(folder), counted.params, counted.flops, error)


def measured_error(model: nn.Module, size: tuple[int, int, int]) -> float:
    """The largest difference between logits of two random images and of their flops, relative, in float64."""
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randn(2, *size, generator=generator, dtype=torch.float64)
    return equivariance_error(copy.deepcopy(model).cpu().double().eval(), images_BCHW)


def _flop_ratio(name: str, args: dict[str, Any], size: tuple[int, int, int], flops: int) -> float | None:
    """FLOPs of X over these; None for X itself, and where X does not take the arguments."""
    info = describe(name)
    if info is None or info.variant == "X":
        return None
    ours = {key: value for key, value in args.items() if key not in ("num_flop_blocks", "head")}
    if info.family == "resmlp" and "resmlp_base" not in name and "resmlp_large" not in name and ours:
        return None
    return complexity(build(baseline_of(name), device="meta", **ours), size).flops / flops


def _shown_by(checkpoint: Path, name: str) -> dict[str, Any]:
    """Arguments that a file of weights shows: those noted by `flopeq convert`, else the number of classes."""
    if not checkpoint.is_file():
        raise ValueError(f"there is no {checkpoint}")
    if checkpoint.suffix != ".safetensors":
        return {}
    try:
        with safe_open(checkpoint, framework="pt") as file:
            noted = file.metadata() or {}
            head = [file.get_slice(key).get_shape() for key in file.keys() if key == "head.weight"]  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{checkpoint} is no safetensors file, or it is damaged: {error}") from error
    if noted.get("model", name) != name:
        raise ValueError(f"{checkpoint} holds weights of {noted['model']}, not of {name}")
    if "model_args" in noted:
        return json.loads(noted["model_args"])
    return {"num_classes": head[0][0]} if head else {}


def _load(model: nn.Module, name: str, checkpoint: Path) -> None:
    try:
        load_checkpoint(model, str(checkpoint), strict=True)
    except RuntimeError as error:
        first = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
        raise ValueError(f"{checkpoint} does not fit {name}: {first}") from error
