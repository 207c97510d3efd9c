"""Weights that no run of the experiment made: files of the paper's authors, and safetensors of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flopeq.build import build
from flopeq.convert import convert_authors_state_dict, load_authors_checkpoint, shown_args
from flopeq.registry import MODELS


class WeightsError(ValueError):
    """A file of weights that cannot be read or does not fit; the message says what it holds and what is needed."""


def load(path: Path, model_name: str, args: Mapping[str, Any], *, num_classes: int, image_size: int) -> nn.Module:
    """The model of that name with the weights in a file, `.safetensors` of ours or else the authors' as published.

    Args:
        args: arguments of the model. What the weights of the study's models show need not be given: image size,
            head, LayerScale; what is given wins.
    Raises: WeightsError; ModelError for a model or an argument that does not exist.
    """
    if "num_classes" in args:
        raise WeightsError("num_classes is the data's, and cannot be given")
    tensors = _read(path, model_name)
    try:
        shown: dict[str, Any] = shown_args(tensors, model_name) if model_name in MODELS else {}
    except KeyError as error:
        raise WeightsError(f"{path} lacks {error}: it does not hold the weights of a {model_name}") from None
    if shown.get("num_classes", num_classes) != num_classes:
        raise WeightsError(
            f"{path} tells {shown['num_classes']} classes apart, but the data that params.yaml names have "
            f"{num_classes}: take the preset whose data the weights were trained on"
        )
    side = shown.get("img_size", [image_size] * 2)
    if side != [image_size] * 2:
        raise WeightsError(f"{path} is for images of {side[0]} x {side[1]} pixels, but data.image_size is {image_size}")
    model = build(model_name, **{**shown, "num_classes": num_classes, **args})
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        given = "".join(f" {key}={value}" for key, value in args.items())
        raise WeightsError(f"{path} does not fit {model_name}{given}: {first}") from None
    return model


def _read(path: Path, model_name: str) -> dict[str, Tensor]:
    """The tensors in a file, under our names."""
    if path.suffix != ".safetensors":
        try:
            return convert_authors_state_dict(load_authors_checkpoint(path), model_name)
        except (ValueError, OSError) as error:
            raise WeightsError(str(error)) from None
    try:
        with safe_open(path, "pt") as file:
            holds = (file.metadata() or {}).get("model", model_name)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors: {error}") from None
    if holds != model_name:
        raise WeightsError(f"{path} holds the weights of a {holds}, not of a {model_name}")
    return tensors
