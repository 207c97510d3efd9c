"""Checks params.yaml and what it names before anything long starts: data, cluster, models, arguments."""

from __future__ import annotations

import os

from pipeline import cluster, config
from pipeline.config import ConfigError
from stages import main, prepare


def run() -> None:
    """Raises ConfigError, SourceError or ClusterError on the first mistake, and is silent when there is none."""
    experiment = config.load()
    if experiment.data.name != prepare.DIGITS:  # those, the prepare stage writes
        prepare.ensure(experiment.data)
    if address := os.environ.get("RAY_ADDRESS"):
        cluster.probe(address)

    from flopeq.build import ModelError
    from pipeline import execution, further, hybrids, recipe, space

    further.check(experiment.data)
    found = {name: run for name, run in experiment.models.items() if run.recipe in experiment.recipes}
    for name, run in found.items():  # the others' recipes, a sweep has yet to find
        try:
            model = recipe.model(run, experiment.recipe(name), num_classes=10, seed=0, device="meta")
            execution.arrange(model, experiment.train)
        except ModelError as error:
            raise ConfigError(f"params.yaml: models.{name}: {error}") from None
    for name in sorted({run.recipe for run in found.values()}):
        try:
            recipe.check(experiment.recipes[name], experiment.data, experiment.train)
        except ConfigError as error:
            raise ConfigError(f"params.yaml: recipes.{name}: {error}") from None
    try:
        space.check(experiment)
        for name in experiment.sweeps.hybrid.runs:
            hybrids.splits_of(experiment, name)
    except ConfigError as error:
        raise ConfigError(f"params.yaml: {error}") from None


if __name__ == "__main__":
    main(run)
