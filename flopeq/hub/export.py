"""Exports a model to a folder that timm loads: safetensors, config.json and a model card with measured values."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.models import load_checkpoint, save_for_hf
from torch import nn

from flopeq.groups import C2, C2XC2, D4
from flopeq.hub.model_card import FLOAT64_ERROR, TrainedRun, failure_reason, render_card
from flopeq.layers.group.orbits import size_of_fields
from flopeq.measure.flops import complexity
from flopeq.models.build import build
from flopeq.models.variants import baseline_name
from flopeq.registry import ARGS_OF_SYMMETRY, describe
from flopeq.square import Symmetry
from flopeq.symmetrization.wrapper import Symmetrized, symmetrize
from flopeq.testing import errors_by_symmetry, logit_group, network_group


@dataclass(frozen=True)
class ExportResult:
    """The folder that `export_model` wrote, and the measured values."""

    model: str
    folder: str
    params: int
    flops: int
    equivariance_error: float
    """The largest under the symmetries that do not change the logits by construction; if there are none, under any."""


def load_trained_run(folder: Path) -> TrainedRun:
    """Reads the files of a trained run. Raises: ValueError if the folder is not that of a trained run."""
    import yaml  # timm requires it

    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is not a trained run: it has no config.yaml, unlike outputs/<run>")
    read = {}
    for name in ("metrics.json", "run.json"):
        path = folder / name
        read[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    metrics, notes = read["metrics.json"], read["run.json"]
    return TrainedRun(config, metrics, notes, failure_reason(notes, metrics))


def export_model(
    name: str | None,
    folder: Path,
    *,
    checkpoint: Path | None = None,
    run: Path | None = None,
    license: str = "apache-2.0",
    symmetrization: Mapping[str, Any] | None = None,
    **args: Any,
) -> ExportResult:
    """Writes a model to a folder in timm's hub layout: model.safetensors, config.json and the model card, README.md.

    `run` is the folder of a trained run, which defines model, arguments, weights and preprocessing. `checkpoint` is a
    file of weights, from safetensors or torch. With `run` it selects another file in the run's folder, such as the
    averaged weights. Without `run` and `checkpoint` the weights are random. Arguments that the checkpoint determines
    can be omitted: those that `flopeq convert` stored, the number of classes, and the channels and size of patches.
    `symmetrization` has the arguments `group` and `how` of `flopeq.symmetrize`, to export the symmetrized model.
    Raises: ValueError if model, arguments and weights do not fit each other.
    """
    trained = None if run is None else load_trained_run(run)
    if run and trained:
        if name not in (None, trained.config["model"]):
            raise ValueError(f"{run} is a run of {trained.config['model']}, not of {name}")
        if described := trained.config.get("symmetrize"):
            source, group, how = run.parent / described["weights_of"], described["group"], described["how"]
            raise ValueError(
                f"{run} has no weights of its own: use `flopeq symmetrize --run {source} --group '{group}' --how {how}`"
            )
        name, args = trained.config["model"], trained.config["args"] | args
        checkpoint = checkpoint or run / "weights.safetensors"
        if checkpoint.resolve().parent != run.resolve():
            raise ValueError(
                f"{checkpoint} is not in {run}, and the card shows that run's accuracies: leave one of them out"
            )
    assert name is not None
    if checkpoint:
        args = _args_from_checkpoint(checkpoint, name) | args
    torch.manual_seed(0)
    model = build(name, **args).eval()
    if checkpoint:
        _load(model, name, checkpoint)
    if symmetrization:
        model = _symmetrize(model, symmetrization)
        trained = trained and _with_symmetrization(trained, symmetrization)
    data = None
    if trained:
        config = trained.config["data"]
        data = {"input_size": (3, config["image_size"], config["image_size"]), "mean": tuple(config["mean"]),
                "std": tuple(config["std"]), "interpolation": config["interpolation"],
                "crop_pct": trained.config["recipe"]["test_crop_ratio"]}  # fmt: skip
    try:
        save_for_hf(model, str(folder), safe_serialization=True, data_config=data,
                    model_config={"pretrained_cfg": {"license": license}})  # fmt: skip
        _drop_repeated_num_classes(folder / "config.json")
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error}") from error
    size = tuple(json.loads((folder / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]["input_size"])
    plain = build(name, device="meta", **args)
    counted = complexity(symmetrize(plain, **symmetrization) if symmetrization else plain, size)
    errors = measure_equivariance_errors(model, size)
    metrics = {
        "complexity/params_m": counted.params / 1e6,
        "complexity/gflops": counted.flops / 1e9,
        "complexity/gmacs": counted.macs / 1e9,
        "complexity/flop_ratio": complexity(plain, size).flops / counted.flops
        if symmetrization
        else _flop_ratio(name, args, size, counted.flops),
        **{f"{FLOAT64_ERROR}/{g}": error for g, error in errors.items()},
    }
    weights = f"those of `{checkpoint.name}`" if checkpoint else "random, untrained"
    text = render_card(name, args, size, metrics, weights=weights, license=license, run=trained)
    (folder / "README.md").write_text(text, encoding="utf-8")
    promised = [error for g, error in errors.items() if g in _invariance_group(model)]
    return ExportResult(name, str(folder), counted.params, counted.flops, max(promised or errors.values()))


def _drop_repeated_num_classes(path: Path) -> None:
    """Leaves the number of classes out of timm's model_args, because transformers takes it from `num_classes`."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def measure_equivariance_errors(model: nn.Module, size: tuple[int, int, int]) -> dict[Symmetry, float]:
    """The relative equivariance error of the logits in float64, the maximum over two random images, by symmetry.

    The symmetries are those of a symmetrized network's group, or of the first block's group; the flop for X.
    """
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randn(2, *size, generator=generator, dtype=torch.float64)
    group = model.group if isinstance(model, Symmetrized) else network_group(model).elements
    tried = group if len(group) > 1 else C2.elements
    return errors_by_symmetry(copy.deepcopy(model).cpu().double().eval(), images_BCHW, tried)["logits"]


def _invariance_group(model: nn.Module) -> tuple[Symmetry, ...]:
    """The symmetries that do not change the logits."""
    return model.group if isinstance(model, Symmetrized) else logit_group(model).elements


def _symmetrize(model: nn.Module, symmetrization: Mapping[str, Any]) -> Symmetrized:
    if symmetrization["how"] == "weighted":
        raise ValueError("how='weighted' has weights that have to be trained: train flopeq.symmetrize(...) first")
    return symmetrize(model, **symmetrization)


def _with_symmetrization(trained: TrainedRun, symmetrization: Mapping[str, Any]) -> TrainedRun:
    """The run without its accuracies, which are those of the model that is not symmetrized."""
    config = {**trained.config, "symmetrize": {"weights_of": trained.config["run"], **symmetrization}}
    return replace(trained, config=config, metrics={})


def _flop_ratio(name: str, args: dict[str, Any], size: tuple[int, int, int], flops: int) -> float | None:
    """FLOPs of X over those of this model; None for X itself, or if X does not take the arguments."""
    info = describe(name)
    if info is None or info.variant == "X":
        return None
    baseline_args = {key: value for key, value in args.items() if key not in ARGS_OF_SYMMETRY}
    if info.family == "resmlp" and "resmlp_base" not in name and "resmlp_large" not in name and baseline_args:
        return None
    return complexity(build(baseline_name(name), device="meta", **baseline_args), size).flops / flops


def _args_from_checkpoint(checkpoint: Path, name: str) -> dict[str, Any]:
    """Model arguments from a file of weights: those that `flopeq convert` stored, else the number of classes."""
    if not checkpoint.is_file():
        raise ValueError(f"there is no file {checkpoint}")
    if checkpoint.suffix != ".safetensors":
        return {}
    try:
        with safe_open(checkpoint, framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{checkpoint} is not a safetensors file, or it is damaged: {error}") from error
    if metadata.get("model", name) != name:
        raise ValueError(f"{checkpoint} holds weights of {metadata['model']}, not of {name}")
    if "model_args" in metadata:
        return json.loads(metadata["model_args"])
    args = {"num_classes": shapes["head.weight"][0]} if "head.weight" in shapes else {}
    return args | _patch_args(name, shapes)


def _patch_args(name: str, shapes: dict[str, list[int]]) -> dict[str, Any]:
    """in_chans and patch_size of a checkpoint, where they differ from those of the model's name."""
    given = _patch_shape(name, shapes)
    default = _patch_shape(name, {key: list(value.shape) for key, value in build(name, "meta").state_dict().items()})
    if given is None or default is None:
        return {}
    channels = {"in_chans": given[0]} if given[0] != default[0] else {}
    return channels | ({"patch_size": given[1:]} if given[1:] != default[1:] else {})


def _patch_shape(name: str, shapes: dict[str, list[int]]) -> tuple[int, ...] | None:
    """(in_chans, height, width) of a model's patches; None if its first convolution is not among the parameters."""
    config = timm.get_pretrained_cfg(name)
    first_conv = config.first_conv if config else None
    if f"{first_conv}.weight" in shapes:
        return tuple(shapes[f"{first_conv}.weight"][1:])
    if f"{first_conv}.even" in shapes:
        _, channels, height, left = shapes[f"{first_conv}.even"]
        return channels, height, left + shapes[f"{first_conv}.odd"][3]
    for group in (C2XC2, D4):
        kernels = [shapes.get(f"{first_conv}.{irrep.name}") for irrep in group.irreps]
        if all(kernels):
            size = size_of_fields(group, tuple(kernel[2] for kernel in kernels if kernel))
            return kernels[0][1], *size  # pyright: ignore[reportOptionalSubscript]
    return None


def _load(model: nn.Module, name: str, checkpoint: Path) -> None:
    try:
        load_checkpoint(model, str(checkpoint), strict=True)
    except RuntimeError as error:
        first = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
        raise ValueError(f"{checkpoint} does not fit {name}: {first}") from error
