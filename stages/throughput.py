"""Measures forward throughput and peak memory of all runs' models, alternating: reports/throughput.json.

`pass_s` are the seconds of each pass. Where a baseline and what is compared with it `alternated`, the passes of two
models at one position are neighbours, and the report compares them by the ratios of neighbouring passes. A model that
does not fit the device's memory has no images per second.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from stages import load_experiment, run_stage

OUT = Path("reports/throughput.json")


def run() -> None:
    from pipeline import cluster, track
    from pipeline.evaluation.throughput import measure_networks
    from pipeline.reporting.baselines import comparison_groups
    from pipeline.shards.manifests import Shards

    experiment = load_experiment()
    num_classes, groups = Shards(experiment.data.shards).num_classes, comparison_groups(experiment)
    measured = cluster.call_on_gpu(
        measure_networks, experiment, groups, num_classes=num_classes, settings=experiment.train
    )
    rows = []
    for name in experiment.run_names:
        result = measured[name]
        rows.append({"run": name, "model": experiment.run(name).model, **result})
        if result["img_per_s"] is None:
            logging.warning("%s: out of memory on %s; set throughput.batch_size lower", name, result["device"])
            continue
        logging.info("%s: %.0f images/s on %s", name, result["img_per_s"], result["device"])
        if run_id := track.find_run_id(name):  # runs that are not trained yet are measured too
            track.log_results(
                run_id, {"perf/forward_img_per_s": result["img_per_s"], "perf/peak_mem_mb": result["peak_mem_mb"]}
            )
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    run_stage(run)
