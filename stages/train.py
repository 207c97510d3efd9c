"""Trains one run of the experiment: `python -m stages.train <run>`."""

from __future__ import annotations

from pipeline import config
from stages import main


def run(run_name: str) -> None:
    experiment = config.load()
    experiment.run(run_name)
    from pipeline import cluster, verify

    verify.verify_changed(experiment.data.shards)
    cluster.connect(cpus=experiment.train.least_workers * experiment.train.cpus_per_worker)
    from pipeline import train  # imports Ray, which `connect` wants to do first

    train.train(experiment, run_name)


if __name__ == "__main__":
    main(run)
