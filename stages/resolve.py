"""Writes recipes/<name>.yaml, all of one recipe as training takes it: `python -m stages.resolve <name>`.

`train@<run>` depends on that file alone, so that the outcome of a sweep retrains the runs that use it and no others.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from pipeline import config
from pipeline.config import ConfigError
from stages import main

FOLDER = Path("recipes")


def run(name: str) -> None:
    """Raises: ConfigError for a recipe that does not exist, or that a sweep has yet to find."""
    experiment = config.load()
    if name not in experiment.recipes:
        known = [*experiment.recipes, *experiment.sweeps.tuned]
        tuned = experiment.sweeps.tuned.get(name)
        raise ConfigError(f"{tuned.override} not found: a sweep writes it" if tuned else
                          f"no recipe named {name!r}{config.nearest(name, known)}")
    FOLDER.mkdir(exist_ok=True)
    content = {"recipe": experiment.recipes[name].model_dump(mode="json")}
    if name in experiment.sweeps.tuned:
        content["args"] = config.override_of(experiment.sweeps.tuned[name]).args
    (FOLDER / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


if __name__ == "__main__":
    main(run)
