"""Searches recipes for the runs that `sweeps.recipe` names: sweeps/recipe/, with a best.yaml for each."""

from __future__ import annotations

import logging

from stages import load_experiment, run_stage


def run() -> None:
    experiment = load_experiment()
    settings = experiment.sweeps.recipe
    from pipeline import cluster
    from pipeline.sweeps import analysis

    cluster.connect(cpus=settings.cpus(experiment.train))
    from pipeline.sweeps import recipe_sweep  # imports Ray, which `connect` must do first

    for name, found in recipe_sweep.sweep_recipe(experiment).items():
        logging.info("%s: %s", name, analysis.describe_recipe_finding(found))


if __name__ == "__main__":
    run_stage(run)
