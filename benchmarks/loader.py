"""Compares data loaders by images per second and core, from files to uint8 batches: flopeq, timm and torchvision.

    python benchmarks/loader.py --photos /tmp/photos                    crop and flop, then the recipes' augmentations
    python benchmarks/loader.py --photos /tmp/photos --only crop

The script first writes the photos of benchmarks/photos.py if they are missing. flopeq reads them from shards, as in
training; timm and torchvision read their folder. All loaders run in this process, on one core, with one thread. They
alternate in rounds, each with the same number of images. Ratios are medians over rounds, with quartiles.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch
from photos import write_photos
from timm.data import ImageDataset, create_loader
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from pipeline.base import config
from pipeline.loading import augment, batching, datasets
from pipeline.loading.loader import BatchDecoder, BatchRequest
from pipeline.packing import pack
from pipeline.shards import manifests

AUGMENTATIONS = {
    "crop": {},
    "3a": {"auto_augment": "3a", "color_jitter": 0.3},
    "rand": {"auto_augment": "rand-m9-mstd0.5-inc1"},
}
"""Augmentations after the crop and the flop. timm omits color jitter with RandAugment."""
SIDE = 224
ROW = "{:6} {:14} {:>8} {:>8} {:>17}"

Batches = Callable[[], Iterator[Tensor]]
"""uint8 (B, 3, SIDE, SIDE), for ever."""


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    write_photos(args.photos, args.images, val=10)
    print(ROW.format("task", "loader", "img/s", "ours/it", "quartiles"))
    with tempfile.TemporaryDirectory() as folder:
        images = datasets.IndexedImages(shards(args.photos, Path(folder)), "train")
        for name in [args.only] if args.only else AUGMENTATIONS:
            loaders = {
                "ours": ours(images, AUGMENTATIONS[name], args.batch_size),
                "timm": timms(args.photos, AUGMENTATIONS[name], args.batch_size),
            }
            if name == "crop":
                loaders["ImageFolder"] = torchvisions(args.photos, args.batch_size)
            show(name, measure(loaders, rounds=args.rounds, batches=args.images // args.batch_size))


def ours(images: datasets.IndexedImages, augmentation: dict, batch_size: int) -> Batches:
    """What `data.train_batches` has before it goes to the device."""
    recipe = (
        preset()
        .recipes["vit-s"]
        .model_copy(
            update={
                "auto_augment": None,
                "color_jitter": 0.0,
                **augmentation,
                "global_batch_size": batch_size,
            }
        )
    )
    decoder = BatchDecoder(images, augment.build_train_transform(recipe, preset().data))

    def batches() -> Iterator[Tensor]:
        for epoch in itertools.count():
            order = batching.epoch_order(len(images), seed=0, epoch=epoch)
            for start in range(0, len(images) - batch_size + 1, batch_size):
                positions = range(start, start + batch_size)
                rows = order[positions.start : positions.stop].tolist()
                yield decoder.decode(BatchRequest("train", positions, rows, augment.derive_seed(0, epoch))).pixels

    return batches


def timms(photos: Path, augmentation: dict, batch_size: int) -> Batches:
    """timm's loader up to where it goes to the device, for which it keeps uint8."""
    loader = create_loader(
        ImageDataset(str(photos / "train")),
        (3, SIDE, SIDE),
        batch_size,
        is_training=True,
        num_workers=0,
        interpolation="bicubic",
        persistent_workers=False,
        device=torch.device("cpu"),
        **{"color_jitter": 0.0, **augmentation},
    )
    return endless(cast(DataLoader, loader.loader))  # type: ignore[union-attr]


def torchvisions(photos: Path, batch_size: int) -> Batches:
    """torchvision's classes as its references use them, but with uint8 at the end too."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIDE, interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )
    return endless(DataLoader(ImageFolder(str(photos / "train"), transform), batch_size, shuffle=True, drop_last=True))


def endless(loader: DataLoader) -> Batches:
    def batches() -> Iterator[Tensor]:
        while True:
            for images, _ in loader:
                yield images

    return batches


def measure(loaders: dict[str, Batches], *, rounds: int, batches: int) -> dict[str, list[float]]:
    """Images per second of every loader in every round, after one that is not counted."""
    running = {name: start() for name, start in loaders.items()}
    speeds: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(rounds + 1):
        for name in list(running)[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            images = sum(len(check(next(running[name]))) for _ in range(batches))
            if number:
                speeds[name].append(images / (time.perf_counter() - started))
    return speeds


def check(images: Tensor) -> Tensor:
    assert images.dtype == torch.uint8 and images.shape[1:] == (3, SIDE, SIDE), (images.dtype, images.shape)
    return images


def show(task: str, speeds: dict[str, list[float]]) -> None:
    for name, of in speeds.items():
        ratios = [mine / theirs for mine, theirs in zip(speeds["ours"], of, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        quartiles = f"{low:.2f} to {high:.2f}"
        cells = ("", "") if name == "ours" else (f"{middle:.2f}", quartiles)
        print(ROW.format(task, name, f"{statistics.median(of):.0f}", *cells), flush=True)


def preset() -> config.Experiment:
    """The recipes that the augmentations are taken from."""
    return config.load_experiment(Path(__file__).parent.parent / "presets" / "imagenet.yaml")


def shards(photos: Path, folder: Path) -> manifests.Shards:
    pack.pack_source(str(photos), folder, images_per_shard=256, seed=0)
    return manifests.Shards(folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder for the photos")
    parser.add_argument("--images", type=int, default=256, help="number of photos, and of images per loader and round")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=AUGMENTATIONS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
