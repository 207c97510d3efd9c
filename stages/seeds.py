"""Adds runs with other seeds to params.yaml: `python -m stages.seeds <run> <seed> ...`."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from pipeline.base import config
from pipeline.base.errors import ConfigError
from stages import run_stage

PARAMS = Path("params.yaml")

SEED_RUN_LINE = re.compile(r"^  \S+-seed\d+: \{.*\}\n", re.MULTILINE)
"""The line that `add_seeds` writes for a run."""


def add_seeds(run_names: Sequence[str], new_seeds: Sequence[int]) -> list[str]:
    """Adds runs with the given seeds. Returns their names: `<run>-seed<seed>`, or the run itself for its own seed.

    Raises: ConfigError for no run, an unknown run, or a name that is already used.
    """
    if not run_names:
        raise ConfigError("seeds need runs: name them, as in `make repro RUNS=e-vit SEEDS='0 1 2'`")
    experiment, found, lines = config.load_experiment(PARAMS), [], []
    for name in run_names:
        base = experiment.run(name)
        for seed in new_seeds:
            if seed == experiment.seed_of(name):
                found.append(name)
                continue
            found.append(f"{name}-seed{seed}")
            entry = base.model_copy(update={"seed": seed})
            known = experiment.models.get(found[-1])
            if known is None:
                content = entry.model_dump(mode="json")
                lines.append(f"  {found[-1]}: {yaml.safe_dump(content, default_flow_style=True, width=10**9)}")
            elif known != entry:
                raise ConfigError(f"{PARAMS}: models.{found[-1]} is not {name} with seed {seed}: give it another name")
    if lines:
        text = PARAMS.read_text()
        heading = re.search(r"^models:.*\n", text, re.MULTILINE)
        assert heading is not None  # `load_experiment` has parsed it
        end = re.compile(r"^\S", re.MULTILINE).search(text, heading.end())
        at = len(text[: end.start() if end else len(text)].rstrip()) + 1
        PARAMS.write_text(text[:at] + "".join(lines) + text[at:])
        config.load_experiment(PARAMS)
        logging.info("%s: added %d runs", PARAMS, len(lines))
    return found


def remove_seed_runs(text: str) -> str:
    """Returns the text of a params.yaml without the runs that `add_seeds` added."""
    return SEED_RUN_LINE.sub("", text)


if __name__ == "__main__":
    run_stage(lambda name, *new_seeds: add_seeds([name], [int(seed) for seed in new_seeds]))
