"""Measures the overhead of Ray Train and checkpoints: training images per second relative to a plain loop.

    python benchmarks/train_overhead.py --run vit --epochs 150 --steps 100

trains one run of params.yaml on the digits in three processes. They alternate in turns of `--steps` steps, so a
slowdown of the machine affects all three. `plain` runs `pipeline.training.loop.fit` over the same batches without Ray,
MLflow and files. `ray` trains with one worker as stages/train.py does. `checkpoints` adds a checkpoint in the middle of
every turn. The first turns are warm-up, validation is not timed, and start-up is reported separately. Ray's own
processes slow down all three on a machine with few cores; their load is reported as a share of one core.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline import cluster
from pipeline.base import config
from pipeline.loading import batching, datasets
from pipeline.packing import pack
from pipeline.packing.sources import digits
from pipeline.shards import manifests
from pipeline.training import loop, recipe, worker

ROOT = Path(__file__).resolve().parent.parent
PLAIN, RAY, CHECKPOINTS = WAYS = ("plain", "ray", "checkpoints")
UNCOUNTED = 4  # turns
POLL_S = 0.002


def main() -> None:
    args = parse()
    if args.way:
        train(args)
        return
    # Ray starts its workers with low priority (nice 15), so other programs would slow them down more than `plain`.
    os.environ |= {"PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        source = config.load_experiment(ROOT / "params.yaml").data
        digits.write_digits(Path(source.source))
        pack.pack_source(source.source, source.shards, images_per_shard=512, seed=0)
        for way in WAYS:
            Path(way).mkdir()
            Path(way, "data").symlink_to(Path("data").absolute())
        Path("turn").write_text(PLAIN)
        with cluster.local_cluster(cpus=len(WAYS)):
            started = time.time()
            trainings = [subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--way", way]) for way in WAYS]
            try:
                wait(lambda: all(len(seconds(way)) > UNCOUNTED for way in WAYS), trainings)
                began, before = time.monotonic(), rays_own_cpu_s(trainings)
                wait(lambda: any(training.poll() is not None for training in trainings), trainings)
                after = rays_own_cpu_s(trainings)
                own = sum(after[pid] - before[pid] for pid in before.keys() & after.keys())
                share = own / (time.monotonic() - began) / (len(WAYS) - 1)
                for training in trainings:
                    training.wait()
            finally:
                for training in trainings:
                    training.kill()
        show(args, started, share)


def train(args: argparse.Namespace) -> None:
    """One of the three, in its own folder."""
    os.chdir(args.way)
    experiment = config.load_experiment(ROOT / "params.yaml")
    name = experiment.run(args.run).recipe
    short = experiment.recipes[name].model_copy(update={"epochs": args.epochs, "warmup_epochs": 1})
    steps = args.steps if args.way == CHECKPOINTS else None
    settings = experiment.train.model_copy(update={"workers": 1, "loader_workers": 0, "checkpoint_steps": steps})
    experiment = experiment.model_copy(update={"recipes": {**experiment.recipes, name: short}, "train": settings})
    timed = taking_turns(args.way, str(Path.cwd().parent), steps=args.steps, epochs=args.epochs)
    if args.way == PLAIN:
        plain(experiment, args.run, timed)
        return
    from pipeline.training import trainer

    def work(task: worker.WorkerTask) -> Any:
        loader = batching.BatchLoader
        loader.train_batches = timed(loader.train_batches)
        return worker.train_loop_per_worker(task)

    trainer.train_loop_per_worker = work
    trainer.train_run(experiment, args.run)


def plain(experiment: config.Experiment, run_name: str, timed: Callable[[Any], Any]) -> None:
    """The loop over the batches that a worker would have, and nothing else."""
    torch.set_num_threads(experiment.train.cpus_per_worker)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shards, recipe_ = manifests.Shards(experiment.data.shards), experiment.recipe(run_name)
    images = {split: datasets.IndexedImages(shards, split) for split in ("train", "val")}
    model = recipe.build_model(experiment.run(run_name), recipe_, num_classes=shards.num_classes, seed=0).to(device)
    amp = experiment.train.amp if recipe_.mixed_precision else None
    train_batches = timed(batching.train_batches)
    loop.fit(
        loop.TrainState.create(
            model,
            recipe_,
            amp=amp,
            steps_per_epoch=batching.steps_per_epoch(len(images["train"]), recipe_.global_batch_size),
        ),
        recipe_,
        train_batches=lambda epoch, start_step: train_batches(
            images["train"], recipe_, experiment.data, seed=0, epoch=epoch, start_step=start_step, device=device
        ),
        val_batches=lambda: batching.val_batches(
            images["val"], recipe_, experiment.data, batch_size=recipe_.global_batch_size, device=device
        ),
        on_epoch=lambda training: None,
        num_classes=shards.num_classes,
        seed=0,
        amp=amp,
    )


def taking_turns(way: str, place: str, *, steps: int, epochs: int) -> Callable[[Any], Any]:
    """Makes `train_batches` wait for this training's turns of so many steps, and note how long each took."""
    following, poll_s = dict(zip(WAYS, WAYS[1:] + WAYS[:1], strict=True))[way], POLL_S
    noted, turn = Path(place, way, "seconds"), Path(place, "turn")
    done, took = 0, 0.0  # total steps, and seconds of this turn

    def wrap(train_batches: Callable[..., Iterator[batching.Batch]]) -> Callable[..., Iterator[batching.Batch]]:
        def batches_in_turns(*args: Any, **kwargs: Any) -> Iterator[batching.Batch]:
            nonlocal done, took
            if not done:
                Path(place, way, "startup").write_text(f"{time.time()}")
            started = wait_for_turn()
            for batch in train_batches(*args, **kwargs):
                yield batch
                done += 1
                if done % steps == steps // 2:
                    note(took + now() - started)
                    pass_on()
                    took, started = 0.0, wait_for_turn()
            took += now() - started
            if kwargs["epoch"] == epochs - 1:
                pass_on()

        return batches_in_turns

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def wait_for_turn() -> float:
        while turn.read_text() != way:
            time.sleep(poll_s)
        return now()

    def note(seconds: float) -> None:
        with noted.open("a") as file:
            file.write(f"{seconds}\n")

    def pass_on() -> None:
        partial = turn.with_suffix(f".{way}")
        partial.write_text(following)
        partial.replace(turn)

    return wrap


def seconds(way: str) -> list[float]:
    """Of each turn so far."""
    path = Path(way, "seconds")
    return [float(line) for line in path.read_text().split()] if path.exists() else []


def wait(happened: Callable[[], bool], trainings: list[subprocess.Popen]) -> None:
    while not happened():
        if any(training.poll() for training in trainings):
            sys.exit("one of the trainings failed")
        time.sleep(0.2)


def rays_own_cpu_s(trainings: list[subprocess.Popen]) -> dict[int, float]:
    """CPU time so far of each of Ray's processes and of the drivers; not of workers and the plain loop."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if process.pid != trainings[0].pid and "RayTrainWorker" not in " ".join(process.cmdline()):
                found[process.pid] = sum(process.cpu_times()[:2])
        except psutil.Error:  # the process has just ended
            continue
    return found


def show(args: argparse.Namespace, started: float, share: float) -> None:
    experiment = config.load_experiment(ROOT / "params.yaml")
    images = args.steps * experiment.recipe(args.run).global_batch_size
    turns = min(len(seconds(way)) for way in WAYS)
    took = {way: seconds(way)[UNCOUNTED:turns] for way in WAYS}
    for way in WAYS:
        print(
            f"{way:12} {images / statistics.median(took[way]):8.0f} images/s, "
            f"first batch after {float(Path(way, 'startup').read_text()) - started:.0f} s"
        )
    for way, against in ((RAY, PLAIN), (CHECKPOINTS, RAY)):
        ratios = [theirs / rank_args for rank_args, theirs in zip(took[way], took[against], strict=True)]
        low, middle, high = (100 * (ratio - 1) for ratio in statistics.quantiles(ratios, n=4, method="inclusive"))
        all_of = 100 * (sum(took[against]) / sum(took[way]) - 1)
        print(
            f"{way} against {against}: {middle:+.1f} % (median of {len(ratios)} pairs of turns; quartiles {low:+.1f} "
            f"and {high:+.1f}; all turns together {all_of:+.1f})"
        )
    print(f"Ray's own processes and the driver, of one training: {100 * share:.0f} % of a core")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="vit", help="run of params.yaml")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--steps", type=int, default=100, help="steps per turn, and between checkpoints")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
