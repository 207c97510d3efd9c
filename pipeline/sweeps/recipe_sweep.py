"""The recipe sweep: searches a better recipe for each of its runs, and writes what it finds to sweeps/recipe/."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.base.config import Experiment
from pipeline.base.yaml_files import dump_yaml
from pipeline.sweeps import analysis, engine, search_space
from pipeline.sweeps.recipe_search import RecipeSearch
from pipeline.sweeps.sweep import Sweep
from pipeline.sweeps.trial import TrialOutcome, write_trials_csv

OUTPUT_DIR = Path("sweeps/recipe")


class SweepError(RuntimeError):
    """The sweep has no result. The message says why."""


def sweep_recipe(experiment: Experiment) -> dict[str, Any]:
    """Runs or resumes the sweep and writes sweeps/recipe/. Returns its findings by run name.

    Raises:
        ConfigError, ShardError, ClusterError: for invalid parameters, data or cluster.
        SweepError: no trial of a run finished.
    """
    search_space.check_search_space(experiment)
    settings = experiment.sweeps.recipe
    sweep = Sweep(experiment, "recipe", settings)
    searches = {name: RecipeSearch(sweep, name) for name in settings.runs}
    findings: dict[str, Any] = {}
    OUTPUT_DIR.mkdir(parents=True, exist_ok=True)
    if not searches:
        _write_results(searches, {}, findings)
        return findings
    planned = [
        *((search.max_search_trials, search.initial_trial()) for search in searches.values()),
        *((s.max_confirmation_trials, s.initial_trial(is_confirmation=True)) for s in searches.values()),
    ]
    sweep.log_cost(planned)
    outcomes, reporter = engine.run_sweep(
        sweep, {name: search.plan_trials() for name, search in searches.items()}, planned=planned, asha=settings.asha
    )
    findings = {name: search.summarize() for name, search in searches.items()}
    _write_results(searches, outcomes, findings)

    from pipeline.sweeps import figures  # imports matplotlib, which the trials' processes do not need

    rendered_figures = figures.draw_recipe_sweep(OUTPUT_DIR)
    for figure in rendered_figures:
        (OUTPUT_DIR / f"{figure.name}.png").write_bytes(figure.png)
    numbers = {f"best/{name}/top1_pct": found["best"] and found["best"]["top1_pct"] for name, found in findings.items()}
    numbers |= {
        f"best/{name}/rank_correlation": found["ranking"] and found["ranking"]["coefficient"]
        for name, found in findings.items()
    }
    cost = sum(found["train_s"] for found in findings.values())
    reporter.finish({**numbers, "cost/train_s": cost}, sorted(path for path in OUTPUT_DIR.rglob("*") if path.is_file()))
    if failed := [name for name, found in findings.items() if found["best"] is None]:
        raise SweepError(f"no trial of {', '.join(failed)} finished: see {OUTPUT_DIR / 'trials.csv'}")
    return findings


def _write_results(
    searches: Mapping[str, RecipeSearch], outcomes: Mapping[str, Sequence[TrialOutcome]], findings: Mapping[str, Any]
) -> None:
    (OUTPUT_DIR / "findings.json").write_text(json.dumps(findings, indent=2) + "\n")
    write_trials_csv(OUTPUT_DIR / "trials.csv", outcomes)
    for name, search in searches.items():
        if search.best is not None:
            write_best(OUTPUT_DIR / name, search, findings[name])


def write_best(folder: Path, search: RecipeSearch, finding: Mapping[str, Any]) -> None:
    """Writes best.yaml, the changes to the run's own recipe; empty ones unless the confirmation has found a gain."""
    folder.mkdir(parents=True, exist_ok=True)
    sentence = f"{search.run_name}, by sweep_recipe: {analysis.describe_recipe_finding(finding)}."
    header = "".join(f"# {line}\n" for line in textwrap.wrap(sentence, 118))
    (folder / "best.yaml").write_text(header + dump_yaml(search_space.to_override(search.final_point)))
