"""Accuracy of X, S(X) and E(X) on images that are flopped, flipped or turned at random.

The shape of the CLIP experiment of Basu et al. 2023 (lambda-equitune) and Baltaji et al. 2024, with the study's own
networks on Fashion-MNIST. For each kind of transformation, S(X) is symmetrized over the group of that kind.

Legend: N images, S seeds.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import flopeq
from benchmarks.fashion_mnist import LabelledImages, load_images, load_network, transform_randomly
from benchmarks.saved_predictions import SavedPredictions
from pipeline.base.files import checksum_file
from pipeline.evaluation import statistics

GROUPS = {"none": "trivial", "flops": "flop", "flips": "flip", "quarter turns": "c4"}
"""The group from which each transformation of an image is drawn."""

HOWS = ("average", "weighted", "choose", "canonical")

NETWORKS = ("X", *(f"S(X), {how}" for how in HOWS), "E")

NUM_CHECKED = 200  # images on which the invariance of S(X) is checked

BATCH_SIZE, TRAIN_BATCH_SIZE = 250, 100

_UNTOUCHED = "|untouched"

log = logging.getLogger(__name__)


class Settings(NamedTuple):
    """What the accuracies depend on, beside the weights."""

    num_images: int = 5000
    """Validation images, the first of the file."""
    num_train_images: int = 5000
    """Training images that the weights of `weighted` see, once."""


@dataclass(frozen=True)
class Row:
    """The accuracy of a network, all seeds together, under one kind of transformation."""

    family: str
    network: str
    transformation: str
    num_seeds: int
    num_images: int
    top1_pct: float
    top1_low_pct: float
    top1_high_pct: float
    minus_x_pct: float | None
    minus_x_low_pct: float | None
    minus_x_high_pct: float | None
    e_minus_pct: float | None
    """Top-1 of E(X) minus that of this network."""
    e_minus_low_pct: float | None
    e_minus_high_pct: float | None
    num_changed: int | None
    """Of the first `NUM_CHECKED` images of each seed, those that get another class than without a transformation."""


def measure_robustness(outputs: Path, data: Path, out: Path, settings: Settings) -> list[Row]:
    """Predicts the classes of all images by all networks that are not yet in `out`, and returns the accuracies."""
    runs = _find_runs(outputs)
    weights = {run: checksum_file(outputs / run / "weights.safetensors") for pair in runs for run in pair}
    saved = SavedPredictions(out / "robustness.npz", {**settings._asdict(), "weights": weights})
    units = [(x, e, network, kind) for x, e in runs for network in NETWORKS for kind in _kinds(network)]
    missing = [unit for unit in units if _name(*unit) not in saved]
    for number, (x, e, network, kind) in enumerate(missing, 1):
        trained, config = load_network(outputs / (e if network == "E" else x))
        val = load_images(data, "val", settings.num_images, config)
        model = _make_network(trained, network, kind, load_images(data, "train", settings.num_train_images, config))
        transformed = transform_randomly(val.images, GROUPS[kind], seed=1)
        classes = predict(model, transformed)
        untouched = predict(model, val.images[:NUM_CHECKED])
        name = _name(x, e, network, kind)
        saved.add(**{name: classes, f"{name}{_UNTOUCHED}": untouched})
        top1 = 100 * (classes == val.labels.numpy()).mean()
        log.info("robustness %d/%d: %s of %s, %s: %.2f%%", number, len(missing), network, x, kind, top1)
    labels = load_images(data, "val", settings.num_images, load_network(outputs / runs[0][0])[1]).labels.numpy()
    return list(_summarize(runs, saved, labels))


@torch.inference_mode()
def predict(model: nn.Module, images_NCHW: Tensor) -> NDArray[np.uint8]:
    """Returns the most likely class of each image, (N,)."""
    return torch.cat([model(batch).argmax(1) for batch in images_NCHW.split(BATCH_SIZE)]).numpy().astype(np.uint8)


def train_weights(model: nn.Module, train: LabelledImages, group: str) -> None:
    """Trains what `how="weighted"` adds to a network, in one pass over the images, each transformed at random."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("model."))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    images = transform_randomly(train.images, group, seed=2)
    for rows in torch.randperm(len(images), generator=torch.Generator().manual_seed(3)).split(TRAIN_BATCH_SIZE):
        F.cross_entropy(model(images[rows]), train.labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


def _find_runs(outputs: Path) -> list[tuple[str, str]]:
    """Returns the X and the E of each family and seed. Raises: ValueError if there are none."""
    names = sorted(path.parent.name for path in outputs.glob("*/weights.safetensors"))
    found = [(name.removeprefix("e-"), name) for name in names if name.startswith("e-")]
    pairs = [(x, e) for x, e in found if x in names and not x.endswith("-tuned")]
    if not pairs:
        raise ValueError(f"{outputs} has no pair of runs <run> and e-<run>: `make repro PRESET=fashion` trains them")
    return pairs


def _kinds(network: str) -> Sequence[str]:
    return [kind for kind in GROUPS if kind != "none" or not network.startswith("S")]


def _name(x: str, _e: str, network: str, kind: str) -> str:
    return f"{x}|{network}|{kind}"


def _make_network(trained: nn.Module, network: str, kind: str, train: LabelledImages) -> nn.Module:
    if not network.startswith("S"):
        return trained
    how: Any = network.partition(", ")[2]
    model = flopeq.symmetrize(trained, GROUPS[kind], how=how).eval()
    if how == "weighted":
        train_weights(model, train, GROUPS[kind])
    return model


def _summarize(runs: Sequence[tuple[str, str]], saved: SavedPredictions, labels_N: NDArray[np.int64]) -> Iterator[Row]:
    families: dict[str, list[tuple[str, str]]] = {}
    for x, e in runs:
        families.setdefault(re.sub(r"-seed\d+$", "", x), []).append((x, e))
    for family, pairs in families.items():
        for kind in GROUPS:
            hits = {
                network: np.stack([saved[_name(*pair, network, kind)] == labels_N for pair in pairs])
                for network in NETWORKS
                if kind in _kinds(network)
            }
            for network, hits_SN in hits.items():
                changed = sum(_count_changed(saved, _name(*pair, network, kind)) for pair in pairs)
                interval = statistics.bootstrap_interval(hits_SN).scaled(100)
                yield Row(
                    family,
                    network,
                    kind,
                    len(hits_SN),
                    hits_SN.shape[1],
                    100 * float(hits_SN.mean()),
                    *interval,
                    *difference_pct(hits_SN, None if network == "X" else hits["X"]),
                    *difference_pct(hits["E"], None if network == "E" else hits_SN),
                    num_changed=None if kind == "none" else changed,
                )


def _count_changed(saved: SavedPredictions, name: str) -> int:
    return int((saved[name][:NUM_CHECKED] != saved[name + _UNTOUCHED]).sum())


def difference_pct(
    hits_SN: NDArray[np.bool_], baseline_SN: NDArray[np.bool_] | None
) -> tuple[float | None, float | None, float | None]:
    """Returns the difference of the means with its paired interval, in points; None three times without a baseline."""
    if baseline_SN is None:
        return None, None, None
    interval = statistics.paired_difference(hits_SN, baseline_SN).scaled(100)
    return 100 * float(hits_SN.mean() - baseline_SN.mean()), interval.low, interval.high
