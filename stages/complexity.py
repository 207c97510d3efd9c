"""Counts parameters and operations per image of every run's model: reports/complexity.json."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from stages import load_experiment, run_stage

OUT = Path("reports/complexity.json")


def run() -> None:
    from flopeq.measure.flops import complexity
    from pipeline import track
    from pipeline.evaluation.networks import build_network
    from pipeline.shards.manifests import Shards

    experiment = load_experiment(uses_ray=False)
    size = (3, experiment.data.image_size, experiment.data.image_size)
    num_classes = Shards(experiment.data.shards).num_classes
    rows = []
    for name in experiment.run_names:
        counted = complexity(build_network(experiment, name, num_classes=num_classes, device="meta"), size)
        rows.append({"run": name, "model": experiment.run(name).model, **asdict(counted)})
        if run_id := track.find_run_id(name):  # runs that are not trained yet are counted too
            track.log_results(
                run_id, {"complexity/params_m": counted.params / 1e6, "complexity/gflops": counted.flops / 1e9}
            )
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    run_stage(run)
