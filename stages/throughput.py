"""Measures forward throughput and peak memory of all runs' models, alternating: reports/throughput.json.

`pass_s` are the seconds of each pass. The passes of two models at one position are neighbours, so that the report can
compare any E or H with its baseline by the ratios of neighbouring passes.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from stages import load_experiment, run_stage

if TYPE_CHECKING:
    from flopeq.measure.throughput import ProgressCallback

OUT = Path("reports/throughput.json")

_COLUMNS = ("device", "dtype", "batch_size", "img_per_s", "img_per_s_quartiles", "peak_mem_mb", "compiled")


def run() -> None:
    import torch

    from flopeq.backends.malloc import keep_freed_memory
    from flopeq.measure.throughput import throughput
    from pipeline import track
    from pipeline.evaluation.networks import build_network
    from pipeline.shards.manifests import Shards

    experiment = load_experiment(uses_ray=False)
    settings, side = experiment.throughput, experiment.data.image_size
    num_classes = Shards(experiment.data.shards).num_classes
    on_gpu = experiment.train.gpu is not False and torch.cuda.is_available()
    if not on_gpu:
        keep_freed_memory()
    models = {name: build_network(experiment, name, num_classes=num_classes) for name in experiment.run_names}
    results = throughput(
        models,
        image_size=(3, side, side),
        batch_size=settings.batch_size,
        warmup=settings.warmup,
        runs=settings.runs,
        dtype=getattr(torch, settings.dtype),
        compile=settings.compile,
        device="cuda" if on_gpu else "cpu",
        on_progress=log_new_models("throughput", len(models), settings.compile),
    )
    rows = []
    for name, result in results.items():
        row = {"run": name, "model": experiment.run(name).model}
        rows.append(row | {key: getattr(result, key) for key in _COLUMNS} | {"pass_s": result.seconds})
        logging.info("%s: %.0f images/s on %s", name, result.img_per_s, result.device)
        if run_id := track.find_run_id(name):  # runs that are not trained yet are measured too
            track.log_results(
                run_id, {"perf/forward_img_per_s": result.img_per_s, "perf/peak_mem_mb": result.peak_mem_mb}
            )
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=2) + "\n")


def log_new_models(stage: str, num_models: int, compile: bool) -> ProgressCallback:
    """Returns a callback that logs each model once, before its first pass, which compiles it if `compile` is set."""
    action = "compiling and warming up" if compile else "warming up"
    started: set[str] = set()

    def log_new_model(model: str, _num_done: int, _total: int) -> None:
        if model not in started:
            started.add(model)
            logging.info("%s: %s %s (%d of %d)", stage, action, model, len(started), num_models)

    return log_new_model


if __name__ == "__main__":
    run_stage(run)
