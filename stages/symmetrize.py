"""Evaluates a symmetrized run, a trained network averaged over a group: `python -m stages.symmetrize <run>`."""

from __future__ import annotations

import logging
from functools import partial

from stages import load_experiment, run_stage


def run(run_name: str) -> None:
    experiment = load_experiment()
    experiment.run(run_name)
    from pipeline import cluster
    from pipeline.evaluation import symmetrized
    from pipeline.shards import verify

    verify.verify_changed(experiment.data.shards)
    call = partial(cluster.call_on_gpu, settings=experiment.train)
    metrics = symmetrized.evaluate_symmetrized_run(experiment, run_name, call=call)
    logging.info("%s  %s", run_name, "  ".join(f"{name} {value:.6g}" for name, value in metrics.items()))


if __name__ == "__main__":
    run_stage(run)
