"""Trains one run of the experiment: `python -m stages.train <run>`."""

from __future__ import annotations

from stages import load_experiment, run_stage


def run(run_name: str) -> None:
    experiment = load_experiment()
    experiment.check_is_trained(run_name)
    from pipeline import cluster
    from pipeline.shards import verify

    verify.verify_changed(experiment.data.shards)
    cluster.connect(cpus=experiment.train.least_workers * experiment.train.cpus_per_worker)
    from pipeline.training import trainer  # imports Ray, which `connect` must do first

    trainer.train_run(experiment, run_name)


if __name__ == "__main__":
    run_stage(run)
