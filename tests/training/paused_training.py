"""Trainings that wait at a step, so that tests can end them there; `trial.json` in the working directory says where.

The rank and step it names wait once, until the file `released` appears: then `reached` has the process's id.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

_POLL_S, _AT_MOST_S = 0.02, 120


def run(run_name: str) -> None:
    """The stage `train`, with `train_loop_per_worker` below in place of its own."""
    from pipeline import cluster
    from pipeline.base import config

    settings = config.load_experiment().train
    cluster.connect(cpus=settings.least_workers * settings.cpus_per_worker)
    from pipeline.training import trainer

    trainer.train_loop_per_worker = train_loop_per_worker
    spec = importlib.util.spec_from_file_location("real_train_stage", ROOT / "stages" / "train.py")
    assert spec is not None and spec.loader is not None
    stage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stage)
    stage.run(run_name)


def train_loop_per_worker(task: Any) -> dict[str, Any]:
    """`pipeline.training.worker.train_loop_per_worker`, waiting where the trial says, and in float64 if it says so."""
    from pipeline.loading import batching
    from pipeline.training import recipe, worker

    place = Path(task.root)
    trial = json.loads((place / "trial.json").read_text())
    if trial.get("float64"):
        recipe.build_model = in_float64(recipe.build_model)
    if "step" in trial:
        loader = batching.BatchLoader
        loader.train_batches = pause_at_step(loader.train_batches, place, **trial)
    return worker.train_loop_per_worker(task)


def pause_at_step(train_batches: Callable[..., Iterator], place: Path, *, step: int, rank: int, **_: Any) -> Callable:
    def batches(self: Any, **settings: Any) -> Iterator:
        per_epoch = len(self.images["train"]) // self.recipe.global_batch_size
        at = settings["epoch"] * per_epoch + settings["start_step"]
        for batch in train_batches(self, **settings):
            if at == step and self.rank == rank and not (place / "reached").exists():
                _until(lambda: any(place.glob("**/steps/*/complete.json")) or (place / "anywhere").exists())
                (place / "reached.partial").write_text(str(os.getpid()))
                (place / "reached.partial").rename(place / "reached")
                _until((place / "released").exists)
            yield batch
            at += batch.ends_step

    return batches


def in_float64(build: Callable[..., Any]) -> Callable[..., Any]:
    def model(*args: Any, **settings: Any) -> Any:
        built = build(*args, **settings).double()
        built.register_forward_pre_hook(_to_double)
        return built

    return model


def _to_double(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tensor.double() for tensor in inputs)


def _until(ready: Callable[[], bool]) -> None:
    give_up = time.monotonic() + _AT_MOST_S
    while not ready() and time.monotonic() < give_up:
        time.sleep(_POLL_S)


if __name__ == "__main__":
    from stages import run_stage
    from tests.training import paused_training

    run_stage(paused_training.run)
