"""Checks params.yaml and what it names before anything long starts: data, cluster, models, arguments."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

from pipeline.config import ConfigError, Experiment, load, nearest
from stages import main


def run() -> None:
    """Raises ConfigError or ClusterError on the first mistake, and is silent when there is none."""
    from pipeline import cluster
    from stages import prepare

    experiment = load()
    if experiment.data.name != prepare.DIGITS:  # those, the prepare stage writes
        prepare.ensure(experiment.data)
    cluster.probe()
    for name in experiment.models:
        _check_model(experiment, name)


def _check_model(experiment: Experiment, name: str) -> None:
    """Builds the run's model without its weights."""
    import timm
    import torch

    import flopeq  # noqa: F401  registers our models

    model, args = experiment.models[name].model, experiment.models[name].args
    if not timm.is_model(model):
        raise ConfigError(
            f"params.yaml: models.{name}.model: unknown model {model!r}{nearest(model, timm.list_models())}"
        )
    drop_path = experiment.recipe(name).drop_path
    try:
        with torch.device("meta"):
            timm.create_model(model, num_classes=10, drop_path_rate=drop_path, **args)
    except Exception as error:  # whatever a model raises at these arguments, they are not what it takes
        unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if unknown:
            known = _arguments(model, unknown[1])
            raise ConfigError(
                f"params.yaml: models.{name}.args.{unknown[2]}: {model} takes no such argument"
                f"{nearest(unknown[2], known)}"
            ) from None
        where = f"params.yaml: models.{name}.args"
        raise ConfigError(f"{where}: {model} does not take {args}: {error}") from error


def _arguments(model: str, class_name: str) -> list[str]:
    """Names of the keyword arguments of a registered model, whose class has the given name."""
    import timm

    entrypoint = timm.models.model_entrypoint(model)
    built: Any = getattr(sys.modules[entrypoint.__module__], class_name, None)
    sources = [entrypoint, *(cls.__init__ for cls in (built.__mro__ if built else ()))]
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    return [
        parameter.name
        for source in sources
        for parameter in inspect.signature(source).parameters.values()
        if parameter.kind in named and parameter.name not in ("self", "pretrained")
    ]


if __name__ == "__main__":
    main(run)
