"""Trains the hybrids of the runs that `sweeps.hybrid` names at every split point: sweeps/hybrid/."""

from __future__ import annotations

import logging

from stages import load_experiment, run_stage


def run() -> None:
    experiment = load_experiment()
    settings = experiment.sweeps.hybrid
    from pipeline import cluster
    from pipeline.sweeps import analysis

    cluster.connect(cpus=settings.cpus(experiment.train))
    from pipeline.sweeps import hybrid_sweep  # imports Ray, which `connect` must do first

    for name, found in hybrid_sweep.sweep_hybrid(experiment).items():
        logging.info("%s: %s", name, analysis.describe_split_finding(found))


if __name__ == "__main__":
    run_stage(run)
