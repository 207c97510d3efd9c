"""Compares X and networks equivariant to larger and larger groups, on images without an up and on images with one.

    python -m benchmarks.orientation                                  all networks, seeds and data sets, in OUT
    python -m benchmarks.orientation --pictures FOLDER --threads 1    with scikit-image's folder skimage/data

The images without an up are those of `benchmarks/turned_crops.py`, the others are the first of Fashion-MNIST. Networks
and recipe are those of presets/fashion.yaml. An interrupted run resumes: a training that has ended is not repeated.
Training images come from the loops of the pipeline, without shards and without Ray.

Legend: S seeds, N images.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import turned_crops
from benchmarks.fashion_mnist import load_pixels
from benchmarks.robustness import difference_pct, predict
from benchmarks.saved_predictions import SavedPredictions
from benchmarks.symmetrization import FASHION_MNIST, describe_measurement, write_csv
from flopeq.backends.malloc import keep_freed_memory
from flopeq.measure.flops import complexity
from flopeq.models.build import build
from flopeq.registry import PREFIXES
from pipeline.base.config import Experiment, load_experiment, override_recipe
from pipeline.base.schema import Run
from pipeline.evaluation import statistics
from pipeline.loading import batching
from pipeline.training import loop, recipe

DATA_SETS = ("turned crops", "Fashion-MNIST")

VARIANTS = ("X", "E", "C2xC2", "D4")

BATCH_SIZE = 250

PRESET = Path(__file__).parents[1] / "presets/fashion.yaml"

log = logging.getLogger(__name__)


class Settings(NamedTuple):
    """What to train. Families and seeds can be added to an earlier run in OUT; other changes need another OUT."""

    families: Sequence[str] = ("convnext",)
    """Runs of the preset."""
    seeds: int = 3
    epochs: int = 24
    batch_size: int = 32
    train_images: int = 1050
    val_images: int = 2800


@dataclass(frozen=True)
class Row:
    """The accuracy of a network, all seeds together, on one data set."""

    data: str
    family: str
    variant: str
    model: str
    parameters: int
    mflops: float
    num_seeds: int
    num_images: int
    top1_pct: float
    top1_low_pct: float
    top1_high_pct: float
    minus_x_pct: float | None
    minus_x_low_pct: float | None
    minus_x_high_pct: float | None
    minus_e_pct: float | None
    minus_e_low_pct: float | None
    minus_e_high_pct: float | None


class ArrayImages:
    """Gray images in memory, as the loops of the pipeline read them."""

    def __init__(self, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self.pixels, self.labels = torch.from_numpy(pixels), torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def read_jpegs(self, rows: Sequence[int]) -> list[bytes]:
        return [b""] * len(rows)  # nothing is encoded

    def decode(self, row: int, jpeg: bytes) -> Tensor:
        return self.pixels[row].expand(3, -1, -1)

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1


def main() -> None:
    """Trains what is missing, and writes rows as CSV and a table as Markdown."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="scikit-image's folder skimage/data, if it is not installed")
    parser.add_argument("--fashion-mnist", type=Path, default=FASHION_MNIST, help="the folder of the IDX files")
    parser.add_argument("--out", type=Path, default=Path(f"results/orientation-{today}"))
    parser.add_argument("--settings", type=json.loads, default={}, help="settings to change, as JSON")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    settings = Settings(**args.settings)
    try:
        rows = measure(turned_crops.find_pictures(args.pictures), args.fashion_mnist, args.out, settings)
    except ValueError as error:  # no pictures, results of other settings
        sys.exit(f"error: {error}")
    write_csv(args.out / "rows.csv", rows)
    description = describe_measurement("benchmarks.orientation") | {"settings": settings._asdict()}
    (args.out / "run.json").write_text(json.dumps(description, indent=2) + "\n")
    (args.out / "table.md").write_text(render_table(rows), encoding="utf-8")
    log.info("the table is in %s", args.out / "table.md")


def measure(pictures: Path, fashion_mnist: Path, out: Path, settings: Settings) -> list[Row]:
    """Trains every network that `out` has no predictions of, and returns the accuracies."""
    experiment = load_experiment(PRESET)
    shared = {name: value for name, value in settings._asdict().items() if name not in ("families", "seeds")}
    saved = SavedPredictions(out / "predictions.npz", shared)
    networks = list(product(DATA_SETS, settings.families, VARIANTS))
    units = [(*network, seed) for seed in range(settings.seeds) for network in networks]
    missing = [unit for unit in units if _name(*unit) not in saved]
    splits = {data: _load_splits(data, pictures, fashion_mnist, settings) for data in DATA_SETS}
    for number, (data, family, variant, seed) in enumerate(missing, 1):
        started, split = time.perf_counter(), splits[data]
        classes = train_and_predict(_run(experiment, family, variant), experiment, split, settings, seed)
        saved.add(**{_name(data, family, variant, seed): classes})
        top1, seconds = 100 * (classes == split["val"].labels.numpy()).mean(), time.perf_counter() - started
        unit = f"{number}/{len(missing)}: {variant} of {family}, {data}, seed {seed}"
        log.info("%s: %.2f%%, %.0f s", unit, top1, seconds)
    labels = {data: split["val"].labels.numpy() for data, split in splits.items()}
    return [row for data, family in product(DATA_SETS, settings.families)
            for row in _summarize(experiment, saved, data, family, labels[data], settings.seeds)]  # fmt: skip


def train_and_predict(
    run: Run, experiment: Experiment, images: Mapping[str, ArrayImages], settings: Settings, seed: int
) -> NDArray[np.uint8]:
    """Trains a network with the preset's recipe and returns the classes that its last weights predict."""
    changes = {"epochs": settings.epochs, "global_batch_size": settings.batch_size}
    recipe_ = override_recipe(experiment.recipes[run.recipe], changes)
    pixels = images["train"].pixels / 255
    mean, std = ((value.item(),) * 3 for value in (pixels.mean(), pixels.std()))
    data = experiment.data.model_copy(update={"mean": mean, "std": std})
    model = recipe.build_model(run, recipe_, num_classes=images["train"].num_classes, seed=seed)
    steps = batching.steps_per_epoch(len(images["train"]), recipe_.global_batch_size)
    training = loop.TrainState.create(model, recipe_, steps_per_epoch=steps, amp=None)
    val = list(batching.val_batches(images["val"], recipe_, data, batch_size=BATCH_SIZE))
    loop.fit(
        training,
        recipe_,
        train_batches=lambda epoch, start_step: batching.train_batches(
            images["train"], recipe_, data, seed=seed, epoch=epoch, start_step=start_step
        ),
        val_batches=lambda: val[:1],  # for the history only: the last weights are used, not the best
        on_epoch=lambda training: None,
        num_classes=images["train"].num_classes,
        seed=seed,
    )
    return predict(model.eval(), torch.cat([batch.images for batch in val]))


def render_table(rows: Sequence[Row]) -> str:
    """Returns one Markdown table for each data set."""
    lines = []
    for data in DATA_SETS:
        lines += [f"**{data}**", "", "| network | parameters | MFLOPs | top-1 % | minus X's | minus E's |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
        for row in (row for row in rows if row.data == data):
            cells = (
                row.family if row.variant == "X" else f"{row.variant}({row.family})",
                f"{row.parameters / 1e3:.0f} k",
                f"{row.mflops:.2f}",
                f"{row.top1_pct:.1f} ({row.top1_low_pct:.1f} to {row.top1_high_pct:.1f})",
                _format_difference(row.minus_x_pct, row.minus_x_low_pct, row.minus_x_high_pct),
                _format_difference(row.minus_e_pct, row.minus_e_low_pct, row.minus_e_high_pct),
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _format_difference(points: float | None, low: float | None, high: float | None) -> str:
    """Formats a difference with its interval and the verdict that this allows."""
    if points is None or low is None or high is None:
        return ""
    return f"{points:+.1f} ({low:+.1f} to {high:+.1f}), {statistics.judge(statistics.Interval(low, high))}"


def _load_splits(data: str, pictures: Path, fashion_mnist: Path, settings: Settings) -> dict[str, ArrayImages]:
    counts = {"train": settings.train_images, "val": settings.val_images}
    if data == "Fashion-MNIST":
        return {split: ArrayImages(*load_pixels(fashion_mnist, split, count)) for split, count in counts.items()}
    per_class = {split: count // len(turned_crops.PICTURES) for split, count in counts.items()}
    return {split: ArrayImages(*turned_crops.load_split(pictures, split, count)) for split, count in per_class.items()}


def _run(experiment: Experiment, family: str, variant: str) -> Run:
    run = experiment.models[family]
    return run.model_copy(update={"model": PREFIXES[variant] + run.model})


def _name(data: str, family: str, variant: str, seed: int) -> str:
    return f"{data}|{family}|{variant}|{seed}"


def _summarize(
    experiment: Experiment, saved: SavedPredictions, data: str, family: str, labels_N: NDArray[np.int64], seeds: int
) -> Iterator[Row]:
    hits = {
        variant: np.stack([saved[_name(data, family, variant, seed)] == labels_N for seed in range(seeds)])
        for variant in VARIANTS
    }
    for variant, hits_SN in hits.items():
        run = _run(experiment, family, variant)
        cost = complexity(build(run.model, num_classes=int(labels_N.max()) + 1, **run.args), (3, 28, 28))
        baseline = None if variant == "X" else hits["X"]
        yield Row(
            data,
            family,
            variant,
            run.model,
            cost.params,
            cost.flops / 1e6,
            *hits_SN.shape,
            100 * float(hits_SN.mean()),
            *statistics.bootstrap_interval(hits_SN).scaled(100),
            *difference_pct(hits_SN, baseline),
            *difference_pct(hits_SN, None if variant in ("X", "E") else hits["E"]),
        )


if __name__ == "__main__":
    main()
