"""Adds runs with other seeds to params.yaml: `python -m stages.seeds <run> <seed> ...`."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.base import config
from pipeline.base.errors import ConfigError
from pipeline.base.schema import Run, SymmetrizedRun
from pipeline.base.yaml_files import dump_yaml, parse_yaml, read_yaml
from stages import run_stage

PARAMS = Path("params.yaml")

SECTIONS = {"models": Run, "symmetrized": SymmetrizedRun}
"""The sections of params.yaml that hold runs."""


def add_seeds(run_names: Sequence[str], new_seeds: Sequence[int]) -> list[str]:
    """Adds runs with the given seeds. Returns their names: `<run>-seed<seed>`, or the run itself for its own seed.

    A run and its symmetrized runs get the same seeds: those of a symmetrized run are also added to the run whose
    weights it uses, and those of a trained run also to its symmetrized runs.
    Raises: ConfigError for no run, an unknown run, or a name that is already used.
    """
    if not run_names:
        raise ConfigError("seeds need runs: name them, as in `make repro RUNS=e-vit SEEDS='0 1 2'`")
    experiment, params = config.load_experiment(PARAMS), read_yaml(PARAMS)
    # As written: in the experiment, tuned recipes have already changed the arguments.
    written = {
        section: {name: model.model_validate(run) for name, run in params[section].items()}
        for section, model in SECTIONS.items()
    }
    added: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for trained in dict.fromkeys(experiment.trained_name(name) for name in run_names):
        for seed in new_seeds:
            if seed == experiment.seed_of(trained):
                continue
            for name in (trained, *_symmetrized_runs(experiment, trained)):
                section = "symmetrized" if name in experiment.symmetrized else "models"
                change = {"weights_of": f"{trained}-seed{seed}"} if section == "symmetrized" else {"seed": seed}
                entry = written[section][name].model_copy(update=change)
                known = written["models"].get(f"{name}-seed{seed}") or written["symmetrized"].get(f"{name}-seed{seed}")
                if known is None:
                    added[section][f"{name}-seed{seed}"] = entry.model_dump(mode="json")
                elif known != entry:
                    raise ConfigError(
                        f"{PARAMS}: {section}.{name}-seed{seed} is not {name} with seed {seed}: give it another name"
                    )
    text = PARAMS.read_text(encoding="utf-8")
    for section, runs in added.items():
        text = _insert_runs(text, section, runs) if runs else text
    if any(added.values()):
        PARAMS.write_text(text, encoding="utf-8")
        logging.info("%s: added %d runs", PARAMS, sum(map(len, added.values())))
    return [
        name if seed == experiment.seed_of(name) else f"{name}-seed{seed}" for name in run_names for seed in new_seeds
    ]


def without_seed_runs(params: Mapping[str, Any], keep: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the content of a params.yaml without the runs that `add_seeds` added, except for those that `keep` has.

    Args:
        keep: the content of another params.yaml.
    """
    kept = {
        section: {
            name: run
            for name, run in params[section].items()
            if (keep and name in keep.get(section, {})) or not _is_seed_run(section, name, run, params)
        }
        for section in SECTIONS
        if section in params
    }
    return {**params, **kept}


def _symmetrized_runs(experiment: config.Experiment, trained: str) -> list[str]:
    return [name for name, run in experiment.symmetrized.items() if run.weights_of == trained]


def _is_seed_run(section: str, name: str, run: Any, params: Mapping[str, Any]) -> bool:
    base, _, seed = name.rpartition("-seed")
    if base not in params[section] or not seed.isdecimal():
        return False
    model = SECTIONS[section]
    try:
        found, written = model.model_validate(run), model.model_validate(params[section][base])
    except ValidationError:
        return False
    change = (
        {"weights_of": f"{written.weights_of}-seed{seed}"}
        if isinstance(written, SymmetrizedRun)
        else {"seed": int(seed)}
    )
    return found == written.model_copy(update=change)


def _insert_runs(text: str, section: str, added: Mapping[str, Any]) -> str:
    """Returns the text of params.yaml with further runs, one line each, at the end of a section.

    Raises: ConfigError if the section is not written as a block.
    """
    params = parse_yaml(text, str(PARAMS))
    expected = {**params, section: {**params[section], **added}}
    if heading := re.search(rf"^{section}:.*\n", text, re.MULTILINE):
        end = re.compile(r"^\S", re.MULTILINE).search(text, heading.end())
        before = text[: end.start() if end else len(text)].rstrip() + "\n"
        lines = "".join(f"  {name}: {dump_yaml(run, flow=True)}" for name, run in added.items())
        changed = before + lines + text[len(before) :]
        if parse_yaml(changed, str(PARAMS)) == expected:
            return changed
    raise ConfigError(f"{PARAMS}: write `{section}` as a block, one indented entry per run, so that runs can be added")


if __name__ == "__main__":
    run_stage(lambda name, *new_seeds: add_seeds([name], [int(seed) for seed in new_seeds]))
