"""Compares writing shards from ImageNet's official archives with `tar cf` and `cp`, in alternation.

    python benchmarks/shard.py                    2,000 photos of about 110 KB, warm, then cold and synced
    python benchmarks/shard.py --index 1281167    time and peak memory for as many tiny images as ImageNet has

All rows use the same images. `ours` reads nested tars in one process, from the scan of the headers to the manifest.
`ours, listed` starts with scanned headers. `tar cf` packs a folder tree. `cp` copies the nested tars. Ratios are
medians over neighbouring passes, with quartiles; a row above 1 is faster. Warm: the sources are in the page cache, and
nothing waits for the disk. Cold and synced: the sources are dropped from the cache first, and the time includes `sync`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

from photos import photos

from pipeline.base.imagenet import wnids
from pipeline.packing import pack
from pipeline.packing.sources.detect import ExistingShards, detect_source
from pipeline.shards import manifests

sys.path.append(str(Path(__file__).resolve().parent.parent))
from tests.packing import layouts

IMAGES_PER_SHARD = 1000
ROW = "{:16} {:14} {:>7} {:>8} {:>15} {:>8} {:>15}"


def compare(folder: Path, num: int, rounds: int) -> None:
    """Prints a row for warm passes and one for cold and synced ones."""
    images = dict(photos(num)) | dict(photos(50, split="val"))
    num_mb = sum(map(len, images.values())) / 1e6
    archives, tree = layouts.archives(images, folder / "archives"), layouts.folder_tree(images, folder / "tree")
    del images
    out = folder / "out"

    def ours() -> None:
        pack.pack_source(str(archives), out, images_per_shard=IMAGES_PER_SHARD, seed=0, in_process=True)

    found = detect_source(str(archives))
    assert not isinstance(found, ExistingShards)
    listing = found.list_images("own")

    def listed() -> None:
        pack.pack_listing(
            listing, archives, out, source=str(archives), images_per_shard=IMAGES_PER_SHARD, seed=0, in_process=True
        )

    def tar() -> None:
        out.mkdir()
        subprocess.run(["tar", "cf", out / "images.tar", "-C", tree, "train", "val"], check=True)

    def cp() -> None:
        out.mkdir()
        subprocess.run(["cp", *archives.glob("*.tar"), out], check=True)

    contenders = {"ours": ours, "ours, listed": listed, "tar cf": tar, "cp": cp}
    print(f"{num} photos, {num_mb:.0f} MB, {num_mb / num * 1e3:.0f} KB each; {os.cpu_count()} cores; {rounds} rounds")
    print(ROW.format("", "", "MB/s", "x tar cf", "quartiles", "x cp", "quartiles"))
    for name, cold in (("warm", False), ("cold and synced", True)):
        seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
        for number in range(rounds + 1):  # the first is a warm-up
            for contender, run in contenders.items():
                took = timed(run, [archives, tree] if cold else [])
                shutil.rmtree(out)
                if number:
                    seconds[contender].append(took)
        for contender, times in seconds.items():
            cells = [cell for other in ("tar cf", "cp") for cell in ratios(seconds[other], times)]
            print(ROW.format(name, contender, f"{num_mb / statistics.median(times):.0f}", *cells), flush=True)


def timed(run: Callable[[], None], dropped: list[Path]) -> float:
    """Seconds that it takes; where folders are dropped from the page cache first, until all is on the disk."""
    os.sync()
    for folder in dropped:
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    run()
    if dropped:
        os.sync()
    return time.perf_counter() - start


def ratios(slow: list[float], fast: list[float]) -> tuple[str, str]:
    """Median and quartiles of slow/fast, pass by pass."""
    pairs = [a / b for a, b in zip(slow, fast, strict=True)]
    low, median, high = statistics.quantiles(pairs, n=4, method="inclusive")
    return f"{median:.2f}", f"{low:.2f} to {high:.2f}"


def index(folder: Path, num: int) -> None:
    """Writes shards of `num` tiny images out of nested tars, and prints time and peak memory."""
    layouts.archives(layouts.images(train=1, val=50, wnids=wnids()), folder / "archives")
    content = layouts.jpeg(0)
    with tarfile.open(folder / "archives" / layouts.TRAIN_TAR, "w") as outer:
        for place, wnid in enumerate(wnids()):
            with tempfile.TemporaryFile(dir=folder) as file:
                with tarfile.open(fileobj=file, mode="w") as inner:
                    for number in range(place * num // 1000, (place + 1) * num // 1000):
                        layouts.add_file(inner, f"{wnid}_{number}.JPEG", content)
                header = tarfile.TarInfo(f"{wnid}.tar")
                header.size = file.tell()
                file.seek(0)
                outer.addfile(header, file)
    with get_context("spawn").Pool(1) as pool:  # a process of its own, to measure its peak memory
        manifest, took, before, peak = pool.apply(measured, (folder,))
    print(
        f"{sum(manifest.counts.values()):,} images of {len(content)} bytes into {len(manifest.shards):,} shards: "
        f"{took:.0f} s, peak memory {peak} MB, of which {before} MB are Python with its libraries"
    )


def measured(folder: Path) -> tuple[manifests.Manifest, float, int, int]:
    """What was written, seconds, and the peak memory before and after, in MB."""
    wnids()  # imports torch
    before, start = peak_mb(), time.perf_counter()
    manifest = pack.pack_source(
        str(folder / "archives"), folder / "out", images_per_shard=IMAGES_PER_SHARD, seed=0, in_process=True
    )
    return manifest, time.perf_counter() - start, before, peak_mb()


def peak_mb() -> int:
    """Peak resident memory of this process; getrusage would count its parent's as well."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="number of photos")
    parser.add_argument("--rounds", type=int, default=9, help="passes per row")
    parser.add_argument("--index", type=int, help="number of tiny images to measure with instead")
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.index:
            index(Path(folder), args.index)
        else:
            compare(Path(folder), args.images, args.rounds)


if __name__ == "__main__":
    main()
