"""Images of Fashion-MNIST as tensors, and the networks that the study on it has trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from flopeq.hub.export import load_trained_run
from flopeq.models.build import build
from flopeq.square import symmetry_group
from pipeline.packing.sources.idx import IdxFiles, read_idx

NUM_CLASSES = 10


@dataclass(frozen=True)
class LabelledImages:
    """The first images of a split, in the order of its file."""

    images: Tensor
    """(N, 3, 28, 28) float32, normalized as the study's images."""
    labels: Tensor
    """(N,) int64."""


def load_pixels(folder: Path, split: str, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Loads the first `count` images of `train` or `val`, (N, 28, 28), and their labels, (N,)."""
    prefix = {"train": "train", "val": "t10k"}[split]
    names = [name for name, _ in IdxFiles(folder).list_files()]
    pixels, labels = (
        read_idx(folder / name, kind)[:count]
        for kind in ("images", "labels")
        for name in names
        if name.startswith(f"{prefix}-{kind}")
    )
    return np.array(pixels), np.array(labels, np.int64)


def load_images(folder: Path, split: str, count: int, config: Mapping[str, Any]) -> LabelledImages:
    """Loads the same images, normalized with mean and std of a run's config.yaml."""
    pixels, labels = map(torch.from_numpy, load_pixels(folder, split, count))
    mean, std = (torch.tensor(config["data"][key]).view(3, 1, 1) for key in ("mean", "std"))
    return LabelledImages((pixels[:, None] / 255 - mean) / std, labels)


def load_network(folder: Path) -> tuple[nn.Module, Mapping[str, Any]]:
    """Loads the network of outputs/<run>, in evaluation mode, and its config.yaml."""
    config = load_trained_run(folder).config
    model = build(config["model"], num_classes=NUM_CLASSES, **config["args"])
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    return model.eval(), config


def transform_randomly(images_NCHW: Tensor, group: str, seed: int) -> Tensor:
    """Returns the images, each transformed by an element of the group that is drawn for it."""
    elements = symmetry_group(group)
    drawn = torch.randint(len(elements), (len(images_NCHW),), generator=torch.Generator().manual_seed(seed))
    transformed = images_NCHW.clone()
    for number, g in enumerate(elements):
        transformed[drawn == number] = g(images_NCHW[drawn == number])
    return transformed
