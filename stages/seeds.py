"""Runs with other seeds, written into params.yaml: `python -m stages.seeds <run> <seed> ...`."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from pipeline import config
from pipeline.config import ConfigError
from stages import main

PARAMS = Path("params.yaml")
LINE = re.compile(r"^  \S+-seed\d+: \{.*\}\n", re.MULTILINE)
"""What is written for a run."""


def run(run_names: Sequence[str], wanted: Sequence[int]) -> list[str]:
    """Names of the runs that are `run_names` with the wanted seeds: `<run>-seed<seed>`, or the run itself.

    Raises: ConfigError for no run, an unknown run, or a name that is taken.
    """
    if not run_names:
        raise ConfigError("seeds are for runs: name them, as in `make repro RUNS=e-vit SEEDS='0 1 2'`")
    experiment, found, lines = config.load(PARAMS), [], []
    for name in run_names:
        base = experiment.run(name)
        for seed in wanted:
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
        assert heading is not None  # `config.load` has found it
        end = re.compile(r"^\S", re.MULTILINE).search(text, heading.end())
        at = len(text[: end.start() if end else len(text)].rstrip()) + 1
        PARAMS.write_text(text[:at] + "".join(lines) + text[at:])
        config.load(PARAMS)
        logging.info("%s has %d runs more", PARAMS, len(lines))
    return found


def without(text: str) -> str:
    """A params.yaml without the runs that `run` has added."""
    return LINE.sub("", text)


if __name__ == "__main__":
    main(lambda name, *wanted: run([name], [int(seed) for seed in wanted]))
