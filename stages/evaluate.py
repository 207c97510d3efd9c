"""Evaluates one trained run on the validation split: `python -m stages.evaluate <run>`."""

from __future__ import annotations

import logging
from functools import partial

from stages import load_experiment, run_stage


def run(run_name: str) -> None:
    experiment = load_experiment()
    experiment.check_is_trained(run_name)
    from pipeline import cluster
    from pipeline.evaluation import evaluate
    from pipeline.shards import verify

    verify.verify_changed(experiment.data.shards)
    call = partial(cluster.call_on_gpu, settings=experiment.train)
    metrics = evaluate.evaluate_run(experiment, run_name, call=call)
    logging.info("%s  %s", run_name, "  ".join(f"{name} {value:.6g}" for name, value in metrics.items()))


if __name__ == "__main__":
    run_stage(run)
