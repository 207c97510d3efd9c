"""Loads weights from files: checkpoints of the paper's authors, and our safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flopeq.hub.convert import convert_authors_state_dict, infer_args, load_authors_checkpoint
from flopeq.models.build import build
from flopeq.registry import MODELS


class WeightsError(ValueError):
    """A weights file cannot be read or does not fit. The message says what it holds and what is needed."""


def load_weights(
    path: Path, model_name: str, args: Mapping[str, Any], *, num_classes: int, image_size: int
) -> nn.Module:
    """Builds a model with the weights of a file: our `.safetensors`, or a checkpoint as the authors published it.

    Args:
        args: arguments of the model. For the study's models, image size, head and LayerScale are inferred from the
            weights; given arguments take precedence.
    Raises: WeightsError; ModelError for a model or an argument that does not exist.
    """
    if "num_classes" in args:
        raise WeightsError("num_classes comes from the data and cannot be given")
    tensors = _read_tensors(path, model_name)
    try:
        inferred_args: dict[str, Any] = infer_args(tensors, model_name) if model_name in MODELS else {}
    except KeyError as error:
        raise WeightsError(f"{path} lacks {error}: it does not hold the weights of a {model_name}") from None
    if "num_group_blocks" in args:  # another way to say what `symmetry` says
        inferred_args.pop("symmetry", None)
    if inferred_args.get("num_classes", num_classes) != num_classes:
        raise WeightsError(
            f"{path} has {inferred_args['num_classes']} classes, but the data of params.yaml has "
            f"{num_classes}: use the preset whose data the weights were trained on"
        )
    image_sides = inferred_args.get("img_size", [image_size] * 2)
    if image_sides != [image_size] * 2:
        raise WeightsError(
            f"{path} is for images of {image_sides[0]} x {image_sides[1]} pixels, but data.image_size is {image_size}"
        )
    model = build(model_name, **{**inferred_args, "num_classes": num_classes, **args})
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        given = "".join(f" {key}={value}" for key, value in args.items())
        raise WeightsError(f"{path} does not fit {model_name}{given}: {first}") from None
    return model


def _read_tensors(path: Path, model_name: str) -> dict[str, Tensor]:
    """Reads the tensors of a file, with our names."""
    if path.suffix != ".safetensors":
        try:
            return convert_authors_state_dict(load_authors_checkpoint(path), model_name)
        except (ValueError, OSError) as error:
            raise WeightsError(str(error)) from None
    try:
        with safe_open(path, "pt") as file:
            stored_model = (file.metadata() or {}).get("model", model_name)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dictionary
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors: {error}") from None
    if stored_model != model_name:
        raise WeightsError(f"{path} holds the weights of a {stored_model}, not of a {model_name}")
    return tensors
