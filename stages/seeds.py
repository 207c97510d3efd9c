"""Adds runs with other seeds to params.yaml: `python -m stages.seeds <run> <seed> ...`."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.base import config
from pipeline.base.errors import ConfigError
from pipeline.base.schema import Run
from pipeline.base.yaml_files import dump_yaml, parse_yaml, read_yaml
from stages import run_stage

PARAMS = Path("params.yaml")


def add_seeds(run_names: Sequence[str], new_seeds: Sequence[int]) -> list[str]:
    """Adds runs with the given seeds. Returns their names: `<run>-seed<seed>`, or the run itself for its own seed.

    Raises: ConfigError for no run, an unknown run, or a name that is already used.
    """
    if not run_names:
        raise ConfigError("seeds need runs: name them, as in `make repro RUNS=e-vit SEEDS='0 1 2'`")
    experiment, found, added = config.load_experiment(PARAMS), [], {}
    # As written: in the experiment, tuned recipes have already changed the arguments.
    written = {name: Run.model_validate(run) for name, run in read_yaml(PARAMS)["models"].items()}
    for name in run_names:
        experiment.run(name)
        base = written[name]
        for seed in new_seeds:
            if seed == experiment.seed_of(name):
                found.append(name)
                continue
            found.append(f"{name}-seed{seed}")
            entry = base.model_copy(update={"seed": seed})
            known = written.get(found[-1])
            if known is None:
                added[found[-1]] = entry.model_dump(mode="json")
            elif known != entry:
                raise ConfigError(f"{PARAMS}: models.{found[-1]} is not {name} with seed {seed}: give it another name")
    if added:
        PARAMS.write_text(_insert_runs(PARAMS.read_text(encoding="utf-8"), added), encoding="utf-8")
        logging.info("%s: added %d runs", PARAMS, len(added))
    return found


def without_seed_runs(params: Mapping[str, Any], keep: Collection[str] = ()) -> dict[str, Any]:
    """Returns the content of a params.yaml without the runs that `add_seeds` added, except for the runs to keep."""
    models = params["models"]
    kept = {name: run for name, run in models.items() if name in keep or not _is_seed_run(name, run, models)}
    return {**params, "models": kept}


def _is_seed_run(name: str, run: Any, models: Mapping[str, Any]) -> bool:
    base, _, seed = name.rpartition("-seed")
    if base not in models or not seed.isdecimal():
        return False
    try:
        expected = Run.model_validate(models[base]).model_copy(update={"seed": int(seed)})
        return Run.model_validate(run) == expected
    except ValidationError:
        return False


def _insert_runs(text: str, added: Mapping[str, Any]) -> str:
    """Returns the text of params.yaml with further runs, one line each, at the end of `models`.

    Raises: ConfigError if `models` is not written as a block.
    """
    params = parse_yaml(text, str(PARAMS))
    expected = {**params, "models": {**params["models"], **added}}
    if heading := re.search(r"^models:.*\n", text, re.MULTILINE):
        end = re.compile(r"^\S", re.MULTILINE).search(text, heading.end())
        before = text[: end.start() if end else len(text)].rstrip() + "\n"
        lines = "".join(f"  {name}: {dump_yaml(run, flow=True)}" for name, run in added.items())
        changed = before + lines + text[len(before) :]
        if parse_yaml(changed, str(PARAMS)) == expected:
            return changed
    raise ConfigError(f"{PARAMS}: write `models` as a block, one indented entry per run, so that runs can be added")


if __name__ == "__main__":
    run_stage(lambda name, *new_seeds: add_seeds([name], [int(seed) for seed in new_seeds]))
