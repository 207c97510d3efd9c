"""Searches recipes for the runs that `sweeps.recipe` names: sweeps/recipe/, with a best.yaml for each."""

from __future__ import annotations

import logging

from pipeline import config
from stages import main


def run() -> None:
    experiment = config.load()
    settings = experiment.sweeps.recipe
    from pipeline import cluster, findings

    cluster.connect(cpus=settings.cpus(experiment.train))
    from pipeline import tuning  # imports Ray, which `connect` wants to do first

    for name, found in tuning.sweep_recipe(experiment).items():
        logging.info("%s: %s", name, findings.tuned(found))


if __name__ == "__main__":
    main(run)
