"""Trains the hybrids of the runs that `sweeps.hybrid` names at every split point: sweeps/hybrid/."""

from __future__ import annotations

import logging

from pipeline import config
from stages import main


def run() -> None:
    experiment = config.load()
    settings = experiment.sweeps.hybrid
    from pipeline import cluster, findings

    cluster.connect(cpus=settings.cpus(experiment.train))
    from pipeline import splits  # imports Ray, which `connect` wants to do first

    for name, found in splits.sweep_hybrid(experiment).items():
        logging.info("%s: %s", name, findings.split(found))


if __name__ == "__main__":
    main(run)
