"""Writing shards from ImageNet's official archives, beside `tar cf` and `cp`, in one alternating run.

    python benchmarks/shard.py                    2,000 photos of about 110 KB, warm, then cold and synced
    python benchmarks/shard.py --index 1281167    time and peak memory with as many images as ImageNet has, tiny ones

All three take the same images: we read them from nested tars, in one process, from the scan to the manifest;
`tar cf` packs them from a folder tree; `cp` copies the nested tars. Ratios are medians over neighbouring passes, with
their quartiles; above 1 we are faster. Warm: sources in the page cache, nothing waits for the disk. Cold and synced:
sources dropped from the cache first, and the time includes `sync`.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from photos import photos

from pipeline import shard
from pipeline.imagenet import wnids

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import layouts

IMAGES_PER_SHARD = 1000
ROW = "{:16} {:>9} {:>9} {:>9} {:>10} {:>15} {:>10} {:>15}"


def compare(folder: Path, num: int, rounds: int) -> None:
    """Prints a row for warm passes and one for cold and synced ones."""
    images = dict(photos(num)) | dict(photos(50, split="val"))
    num_mb = sum(map(len, images.values())) / 1e6
    archives, tree = layouts.archives(images, folder / "archives"), layouts.folder_tree(images, folder / "tree")
    del images
    out = folder / "out"

    def ours() -> None:
        shard.write(str(archives), out, images_per_shard=IMAGES_PER_SHARD, seed=0, in_process=True)

    def tar() -> None:
        out.mkdir()
        subprocess.run(["tar", "cf", out / "images.tar", "-C", tree, "train", "val"], check=True)

    def cp() -> None:
        out.mkdir()
        subprocess.run(["cp", *archives.glob("*.tar"), out], check=True)

    contenders = {"ours": ours, "tar cf": tar, "cp": cp}
    print(f"{num} photos, {num_mb:.0f} MB, {num_mb / num * 1e3:.0f} KB each; {os.cpu_count()} cores; {rounds} rounds")
    print(ROW.format("", "ours MB/s", "tar MB/s", "cp MB/s", "ours/tar", "quartiles", "ours/cp", "quartiles"))
    for name, cold in (("warm", False), ("cold and synced", True)):
        seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
        for number in range(rounds + 1):  # the first is not counted
            for contender, run in contenders.items():
                took = timed(run, [archives, tree] if cold else [])
                shutil.rmtree(out)
                if number:
                    seconds[contender].append(took)
        rates = [f"{num_mb / statistics.median(times):.0f}" for times in seconds.values()]
        cells = [cell for other in ("tar cf", "cp") for cell in ratios(seconds[other], seconds["ours"])]
        print(ROW.format(name, *rates, *cells), flush=True)


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
                        layouts.add(inner, f"{wnid}_{number}.JPEG", content)
                header = tarfile.TarInfo(f"{wnid}.tar")
                header.size = file.tell()
                file.seek(0)
                outer.addfile(header, file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    manifest = shard.write(
        str(folder / "archives"), folder / "out", images_per_shard=IMAGES_PER_SHARD, seed=0, in_process=True
    )
    took = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{sum(manifest.counts.values()):,} images of {len(content)} bytes into {len(manifest.shards):,} shards: "
          f"{took:.0f} s, peak memory {peak:.0f} MB ({before:.0f} MB before)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2000, help="photos")
    parser.add_argument("--rounds", type=int, default=9, help="passes of each")
    parser.add_argument("--index", type=int, help="tiny images, instead")
    parser.add_argument("--folder", type=Path, help="where to write; default: the folder for temporary files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.index:
            index(Path(folder), args.index)
        else:
            compare(Path(folder), args.images, args.rounds)


if __name__ == "__main__":
    main()
