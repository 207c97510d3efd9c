"""Writes recipes/<name>.yaml, a complete recipe as training uses it: `python -m stages.resolve <name>`.

`train@<run>` depends on that file only, so a new result of a sweep retrains only the runs that use it.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.base import config, errors
from pipeline.base.errors import ConfigError
from pipeline.base.yaml_files import dump_yaml
from stages import run_stage

FOLDER = Path("recipes")


def run(name: str) -> None:
    """Raises: ConfigError for a recipe that does not exist, or that a sweep has yet to find."""
    experiment = config.load_experiment()
    if name not in experiment.recipes:
        known = [*experiment.recipes, *experiment.sweeps.tuned]
        tuned = experiment.sweeps.tuned.get(name)
        raise ConfigError(
            f"{tuned.override} not found: a sweep writes it"
            if tuned
            else f"no recipe named {name!r}{errors.did_you_mean(name, known)}"
        )
    FOLDER.mkdir(exist_ok=True)
    content = {"recipe": experiment.recipes[name].model_dump(mode="json")}
    if name in experiment.sweeps.tuned:
        content["args"] = config.load_override(experiment.sweeps.tuned[name]).args
    (FOLDER / f"{name}.yaml").write_text(dump_yaml(content))


if __name__ == "__main__":
    run_stage(run)
