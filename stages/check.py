"""Checks params.yaml and what it names before anything long starts: data, cluster, models, arguments."""

from __future__ import annotations

import os

from pipeline import cluster, config
from pipeline.config import ConfigError
from stages import main, prepare


def run() -> None:
    """Raises ConfigError or ClusterError on the first mistake, and is silent when there is none."""
    experiment = config.load()
    if experiment.data.name != prepare.DIGITS:  # those, the prepare stage writes
        prepare.ensure(experiment.data)
    if address := os.environ.get("RAY_ADDRESS"):
        cluster.probe(address)

    from flopeq.build import ModelError, build

    for name, run in experiment.models.items():
        drop_path = experiment.recipe(name).drop_path
        try:
            build(run.model, device="meta", num_classes=10, drop_path_rate=drop_path, **run.args)
        except ModelError as error:
            raise ConfigError(f"params.yaml: models.{name}: {error}") from None


if __name__ == "__main__":
    main(run)
