"""Checks params.yaml before anything long starts: data, cluster, models, arguments."""

from __future__ import annotations

from pipeline.base.errors import ConfigError
from pipeline.packing.sources import digits
from stages import load_experiment, run_stage


def run() -> None:
    """Raises: ConfigError, SourceError or ClusterError on the first mistake."""
    experiment = load_experiment()
    if experiment.data.name != digits.DIGITS_NAME:  # the prepare stage writes the digits
        digits.open_source(experiment.data)

    from flopeq.models.build import ModelError
    from pipeline.evaluation import validation_sets
    from pipeline.evaluation.networks import build_network
    from pipeline.scaling import grid
    from pipeline.sweeps import search_space, splits
    from pipeline.training import device_settings, recipe

    validation_sets.check_further_sets(experiment.data)
    known_runs = {name: run for name, run in experiment.models.items() if run.recipe in experiment.recipes}
    for name, run in known_runs.items():  # a sweep has yet to find the other recipes
        try:
            model = recipe.build_model(run, experiment.recipe(name), num_classes=10, seed=0, device="meta")
            device_settings.apply_model_settings(model, experiment.train)
        except ModelError as error:
            raise ConfigError(f"params.yaml: models.{name}: {error}") from None
    for name in experiment.symmetrized:
        try:
            build_network(experiment, name, num_classes=10, device="meta")
        except ModelError as error:
            raise ConfigError(f"params.yaml: symmetrized.{name}.group: {error}") from None
    for name in sorted({run.recipe for run in known_runs.values()}):
        try:
            recipe.check_recipe(experiment.recipes[name], experiment.data, experiment.train)
        except ConfigError as error:
            raise ConfigError(f"params.yaml: recipes.{name}: {error}") from None
    try:
        search_space.check_search_space(experiment)
        for name in experiment.sweeps.hybrid.runs:
            splits.splits_to_try(experiment, name)
        if experiment.scaling is not None:
            grid.check_study(experiment)
    except ConfigError as error:
        raise ConfigError(f"params.yaml: {error}") from None


if __name__ == "__main__":
    run_stage(run)
