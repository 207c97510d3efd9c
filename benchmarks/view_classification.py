"""Accuracy and cost of the three designs of `view_networks.py`, on images of Fashion-MNIST.

The shape of the multi-image classification of Baltaji et al. 2024 (Caltech101, 15Scene): the images of a tuple have one
class, and each is turned independently by a multiple of 90 degrees. The encoder is a trained X of the study, without
its classifier, and stays as it is; the heads are trained here. Test tuples are disjoint, so that they are independent.

Legend: T tuples, N images of a tuple, G turns, C channels.
"""

from __future__ import annotations

import logging
import statistics as stats
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.fashion_mnist import NUM_CLASSES, load_images, load_network
from benchmarks.robustness import difference_pct
from benchmarks.saved_predictions import SavedPredictions
from benchmarks.view_networks import DESIGNS, GROUP, Design, Head, SharedFullProduct, build_network, fuse
from flopeq.measure.flops import count_operations
from flopeq.measure.throughput import quartiles, time_call
from pipeline.base.files import checksum_file
from pipeline.evaluation import statistics

ENCODERS = ("vit", "vit-seed1", "vit-seed2")

NUM_IMAGES = (2, 3, 4)

log = logging.getLogger(__name__)


class Settings(NamedTuple):
    """What the accuracies depend on, beside the weights of the encoders."""

    num_train_images: int = 10_000
    num_val_images: int = 10_000
    steps: int = 800
    batch_size: int = 128
    lr: float = 1e-3


@dataclass(frozen=True)
class Row:
    """Accuracy of a design, all seeds together."""

    num_images: int
    design: str
    num_seeds: int
    num_tuples: int
    top1_pct: float
    top1_low_pct: float
    top1_high_pct: float
    minus_plain_pct: float | None
    minus_plain_low_pct: float | None
    minus_plain_high_pct: float | None
    minus_full_pct: float | None
    minus_full_low_pct: float | None
    minus_full_high_pct: float | None
    same_answer_pct: float
    """Tuples with the same class when the images are turned in another way."""


@dataclass(frozen=True)
class CostRow:
    """FLOPs and time of a tuple."""

    num_images: int
    design: str
    encoder_passes: int
    mflops: float
    ms_per_tuple: float
    ms_low: float
    ms_high: float
    time_over_efficient: float
    """Median over neighbouring passes."""


def measure_accuracy(outputs: Path, data: Path, out: Path, settings: Settings) -> list[Row]:
    """Trains the heads that are not yet in `out`, and returns the accuracies."""
    encoders = [name for name in ENCODERS if (outputs / name / "weights.safetensors").is_file()]
    if not encoders:
        raise ValueError(f"{outputs} has no run {' or '.join(ENCODERS)}: `make repro PRESET=fashion` trains them")
    weights = {name: checksum_file(outputs / name / "weights.safetensors") for name in encoders}
    saved = SavedPredictions(out / "views.npz", {**settings._asdict(), "weights": weights})
    labels_val, labels_train = (_labels(outputs / encoders[0], data, split, settings) for split in ("val", "train"))
    number, total = 0, len(encoders) * len(NUM_IMAGES) * len(DESIGNS)
    for seed, name in enumerate(encoders):
        units: list[tuple[int, Design]] = [
            (n, design) for n in NUM_IMAGES for design in DESIGNS if _key(name, n, design) not in saved
        ]
        number += len(NUM_IMAGES) * len(DESIGNS) - len(units)
        if not units:
            continue
        log.info("views: features of %s", name)
        train_NGC, val_NGC = (_encode_turns(outputs / name, data, split, settings) for split in ("train", "val"))
        for num_images, design in units:
            head = train_head(train_NGC, labels_train, num_images, design, seed, settings)
            tuples_TN = disjoint_tuples(labels_val, num_images)
            first, again = (predict(head, val_NGC, tuples_TN, design, seed=turns) for turns in (11, 12))
            key, number = _key(name, num_images, design), number + 1
            saved.add(**{key: first, f"{key}|again": again})
            hits = first == labels_val[tuples_TN[:, 0]].numpy()
            top1 = 100 * hits.mean()
            log.info("views %d/%d: %s, %d images, %s: %.2f%%", number, total, name, num_images, design, top1)
    return list(_summarize(encoders, saved, labels_val))


def train_head(
    features_NGC: Tensor, labels_N: Tensor, num_images: int, design: Design, seed: int, settings: Settings
) -> Head:
    """Trains the head of a design on random tuples of one class, whose images are turned independently."""
    torch.manual_seed(seed)
    head = Head(num_images, features_NGC.shape[-1], NUM_CLASSES)
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    generator = torch.Generator().manual_seed(seed)
    members = [(labels_N == label).nonzero().flatten() for label in range(NUM_CLASSES)]
    fewest = min(len(rows) for rows in members)
    members_KM = torch.stack([rows[:fewest] for rows in members])
    for _ in range(settings.steps):
        classes_T = torch.randint(NUM_CLASSES, (settings.batch_size,), generator=generator)
        drawn_TN = torch.randint(fewest, (settings.batch_size, num_images), generator=generator)
        features_TNGC = _turn(features_NGC[members_KM[classes_T[:, None], drawn_TN]], generator)
        F.cross_entropy(fuse(head, features_TNGC, design), classes_T, label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return head.eval()


@torch.inference_mode()
def predict(head: Head, features_NGC: Tensor, tuples_TN: Tensor, design: Design, seed: int) -> NDArray[np.uint8]:
    """Returns the most likely class of each tuple, whose images are turned independently."""
    features_TNGC = _turn(features_NGC[tuples_TN], torch.Generator().manual_seed(seed))
    return torch.cat([fuse(head, part, design).argmax(1) for part in features_TNGC.split(250)]).numpy().astype(np.uint8)


def disjoint_tuples(labels_N: Tensor, num_images: int) -> Tensor:
    """Returns rows of images, (T, N): tuples of one class in which every image occurs at most once."""
    tuples = []
    for label in range(NUM_CLASSES):
        rows = (labels_N == label).nonzero().flatten()
        tuples.append(rows[: len(rows) // num_images * num_images].view(-1, num_images))
    return torch.cat(tuples)


def measure_cost(outputs: Path, *, batch_size: int = 4, runs: int = 7) -> list[CostRow]:
    """Counts the FLOPs of a tuple and times forward passes, which alternate between the designs."""
    encoder, _ = load_encoder(outputs / ENCODERS[0])
    rows = []
    for num_images in NUM_IMAGES:
        head = Head(num_images, _num_features(encoder), NUM_CLASSES)
        order = len(GROUP)
        networks: dict[str, tuple[nn.Module, int]] = {
            "plain": (build_network(encoder, head, "plain"), num_images),
            "efficient": (build_network(encoder, head, "efficient"), order * num_images),
            "full product": (build_network(encoder, head, "full product"), order**num_images * num_images),
            "full product, passes shared": (SharedFullProduct(encoder, head), order * num_images),
        }
        generator = torch.Generator().manual_seed(0)
        images = [torch.randn(batch_size, 3, 28, 28, generator=generator) for _ in range(num_images)]
        seconds = _time_alternating([network.eval() for network, _ in networks.values()], images, runs)
        efficient = seconds[list(networks).index("efficient")]
        for (name, (network, passes)), times in zip(networks.items(), seconds, strict=True):
            rows.append(
                CostRow(
                    num_images,
                    name,
                    passes,
                    _count_flops(network, images) / 1e6,
                    1e3 * stats.median(times) / batch_size,
                    *quartiles([1e3 * elapsed / batch_size for elapsed in times]),
                    stats.median([slow / fast for slow, fast in zip(times, efficient, strict=True)]),
                )
            )
            log.info("views: %d images, %s: %.2f ms", num_images, name, rows[-1].ms_per_tuple)
    return rows


def load_encoder(folder: Path) -> tuple[nn.Module, dict]:
    """Loads the network of a run without its classifier: images to pooled features."""
    network, config = load_network(folder)
    network.reset_classifier(0)  # pyright: ignore[reportCallIssue]
    return network, dict(config)


@torch.inference_mode()
def _encode_turns(folder: Path, data: Path, split: str, settings: Settings) -> Tensor:
    """Returns the features of every turn of the images of a split, (N, G, C)."""
    encoder, config = load_encoder(folder)
    count = settings.num_train_images if split == "train" else settings.num_val_images
    batches = load_images(data, split, count, config).images.split(250)
    return torch.cat([torch.stack([encoder(g(batch)) for g in GROUP], dim=1) for batch in batches])


def _labels(folder: Path, data: Path, split: str, settings: Settings) -> Tensor:
    count = settings.num_train_images if split == "train" else settings.num_val_images
    return load_images(data, split, count, load_network(folder)[1]).labels


def _num_features(encoder: nn.Module) -> int:
    return encoder.num_features  # pyright: ignore[reportReturnType]


def _turn(features_TNGC: Tensor, generator: torch.Generator) -> Tensor:
    """Features of the images after a random turn of each: the turns of the turned image, in the group's order."""
    turns_TN = torch.randint(len(GROUP), features_TNGC.shape[:2], generator=generator)
    order_TNG = (turns_TN[..., None] + torch.arange(len(GROUP))) % len(GROUP)
    return features_TNGC.gather(2, order_TNG[..., None].expand_as(features_TNGC))


@torch.inference_mode()
def _time_alternating(networks: Sequence[nn.Module], images: Sequence[Tensor], runs: int) -> list[list[float]]:
    seconds: list[list[float]] = [[] for _ in networks]
    for run in range(runs + 1):
        for times, network in zip(seconds, networks, strict=True):
            elapsed = time_call(lambda network=network: network(*images), images[0].device)
            if run:  # the first pass warms up
                times.append(elapsed)
    return seconds


class _OfOneTensor(nn.Module):
    """A network of several images that takes them as one tensor, because the counter passes one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_NBCHW: Tensor) -> Tensor:
        return self.network(*images_NBCHW)


def _count_flops(network: nn.Module, images: Sequence[Tensor]) -> int:
    """FLOPs of one tuple."""
    counts, _ = count_operations(_OfOneTensor(network), torch.stack([image[:1] for image in images]))
    return sum(counts.values())


def _key(name: str, num_images: int, design: str) -> str:
    return f"{name}|{num_images}|{design}"


def _summarize(encoders: Sequence[str], saved: SavedPredictions, labels_N: Tensor) -> Iterator[Row]:
    for num_images in NUM_IMAGES:
        labels = labels_N[disjoint_tuples(labels_N, num_images)[:, 0]].numpy()
        classes = {design: np.stack([saved[_key(e, num_images, design)] for e in encoders]) for design in DESIGNS}
        again = {d: np.stack([saved[_key(e, num_images, d) + "|again"] for e in encoders]) for d in DESIGNS}
        hits = {design: predicted == labels for design, predicted in classes.items()}
        for design in DESIGNS:
            yield Row(
                num_images,
                design,
                len(hits[design]),
                hits[design].shape[1],
                100 * float(hits[design].mean()),
                *statistics.bootstrap_interval(hits[design]).scaled(100),
                *difference_pct(hits[design], None if design == "plain" else hits["plain"]),
                *difference_pct(hits[design], hits["full product"] if design == "efficient" else None),
                same_answer_pct=100 * float((classes[design] == again[design]).mean()),
            )
