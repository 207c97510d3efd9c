"""The recipe sweep: searches a better recipe for each model.

The plan of a run trains its own recipe and suggested recipes in rounds. It then trains its own and the best recipe
again with new seeds. The report uses this second comparison, because the best of many trials is partly lucky.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.base.config import Experiment
from pipeline.base.yaml_files import dump_yaml
from pipeline.sweeps import analysis, engine, search_space
from pipeline.sweeps.search_space import Point
from pipeline.sweeps.sweep import Sweep
from pipeline.sweeps.trial import TRIAL_STATES, TrialOutcome, TrialSpec, write_trials_csv

logger = logging.getLogger(__name__)

OUTPUT_DIR = Path("sweeps/recipe")


class SweepError(RuntimeError):
    """The sweep has no result. The message says why."""


@dataclass(frozen=True)
class PointResult:
    """A point of the search space and its outcomes in the search."""

    point: Point
    """Its changes to the run's own recipe; empty for the own recipe."""
    outcomes: tuple[TrialOutcome, ...]
    """One per seed."""

    @property
    def top1_pct(self) -> float | None:
        """Mean over the seeds of the best validation top-1; None if a trial failed or diverged."""
        ended = [o.top1_pct for o in self.outcomes if o.state in ("finished", "stopped") and o.top1_pct is not None]
        return fmean(ended) if len(ended) == len(self.outcomes) else None

    @property
    def finished(self) -> bool:
        """Whether the trials of all seeds finished."""
        return all(outcome.state == "finished" for outcome in self.outcomes)


class RecipeSearch:
    """The search for one run: its plan and its results so far."""

    def __init__(self, sweep: Sweep, run_name: str) -> None:
        self.sweep, self.run_name = sweep, run_name
        self.settings = sweep.experiment.sweeps.recipe
        self.space = search_space.search_space_of(sweep.experiment, run_name)
        self.initial_point = search_space.initial_point(sweep.experiment, run_name)
        self.configurations: list[PointResult] = []
        self.confirmed: dict[str, list[TrialOutcome]] = {"start": [], "best": []}
        self._indices = itertools.count()

    def plan_trials(self) -> engine.TrialPlan:
        """Yields the rounds of the search, then the round that confirms the best point with new seeds."""
        settings, first = self.settings, self.sweep.experiment.seed_of(self.run_name)
        searcher = search_space.PointSampler(self.space, settings.searcher, self.sweep.experiment.seed)
        seeds = range(first, first + settings.seeds)
        points: list[Point] = [{}, *searcher.ask(min(settings.round, settings.trials or settings.round) - 1)]
        for number in itertools.count():
            if not points:
                break
            outcomes = yield [self._make_trial(point, seed, number) for point in points for seed in seeds]
            by_point = [tuple(outcomes[i : i + len(seeds)]) for i in range(0, len(outcomes), len(seeds))]
            results = [PointResult(point, trials) for point, trials in zip(points, by_point, strict=True)]
            self.configurations += results
            searcher.tell([configuration.top1_pct for configuration in results if configuration.point])
            if number == 0 and (own := results[0].top1_pct) is not None:
                searcher.add(self.initial_point, own)
            remaining = None if settings.trials is None else settings.trials - len(self.configurations)
            points = (
                searcher.ask(settings.round if remaining is None else min(settings.round, remaining))
                if remaining != 0
                else []
            )
        best = self.best
        if best is None or not best.point or not settings.confirm_seeds:
            return
        confirm_seeds = range(seeds.stop, seeds.stop + settings.confirm_seeds)
        specs = [
            self._make_trial(p, seed, number, is_confirmation=True) for p in ({}, best.point) for seed in confirm_seeds
        ]
        outcomes = yield specs
        self.confirmed = {"start": outcomes[: len(confirm_seeds)], "best": outcomes[len(confirm_seeds) :]}

    def initial_trial(self) -> TrialSpec:
        """The run's own recipe, as a trial."""
        run, recipe = search_space.apply_point(self.sweep.experiment, self.run_name, {})
        return self.sweep.make_trial(self.run_name, 0, 0, self.sweep.experiment.seed_of(self.run_name), {}, run, recipe)

    @property
    def best(self) -> PointResult | None:
        """The finished point with the highest mean top-1; the first of equal ones."""
        reached = [c for c in self.configurations if c.finished and c.top1_pct is not None]
        return max(reached, key=lambda c: c.top1_pct or 0.0, default=None)

    def summarize(self) -> dict[str, Any]:
        """Returns the findings as plain JSON values."""
        best, own = self.best, self.configurations[0]
        confirmed = {side: [outcome.top1_pct for outcome in trials] for side, trials in self.confirmed.items()}
        completed = {side: [value for value in values if value is not None] for side, values in confirmed.items()}
        reached = [
            ({**self.initial_point, **c.point}, c.top1_pct) for c in self.configurations if c.top1_pct is not None
        ]
        all_outcomes = [
            *self.confirmed["start"],
            *self.confirmed["best"],
            *(outcome for c in self.configurations for outcome in c.outcomes),
        ]
        return {
            "own": {"params": self.initial_point, "top1_pct": own.top1_pct},
            "best": best
            and {
                "params": {**self.initial_point, **best.point},
                "top1_pct": best.top1_pct,
                "trial": best.outcomes[0].spec.name,
                "is_own": not best.point,
            },
            "confirmed": {**confirmed, "seeds": [outcome.spec.seed for outcome in self.confirmed["best"]]},
            "beyond_spread": analysis.beyond_spread(completed["best"], completed["start"]),
            "importance": search_space.param_importances(self.space, reached),
            "log_fields": [field for field, values in self.space.items() if values.log_uniform is not None],
            "states": {state: Counter(o.state for o in all_outcomes)[state] for state in TRIAL_STATES},
            "train_s": sum(outcome.seconds for outcome in all_outcomes),
        }

    def _make_trial(self, point: Point, seed: int, round: int, *, is_confirmation: bool = False) -> TrialSpec:
        run, recipe = search_space.apply_point(self.sweep.experiment, self.run_name, point)
        return self.sweep.make_trial(
            self.run_name,
            next(self._indices),
            round,
            seed,
            {**self.initial_point, **point},
            run,
            recipe,
            is_confirmation=is_confirmation,
        )


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
    num_trials = sum(_count_trials(search) for search in searches.values())
    sweep.log_cost(num_trials, [search.initial_trial() for search in searches.values()])
    outcomes, reporter = engine.run_sweep(
        sweep,
        {name: search.plan_trials() for name, search in searches.items()},
        num_trials=num_trials,
        asha=settings.asha,
    )
    findings = {name: search.summarize() for name, search in searches.items()}
    _write_results(searches, outcomes, findings)

    from pipeline.sweeps import figures  # imports matplotlib, which the trials' processes do not need

    rendered_figures = figures.draw_recipe_sweep(OUTPUT_DIR)
    for figure in rendered_figures:
        (OUTPUT_DIR / f"{figure.name}.png").write_bytes(figure.png)
    numbers = {f"best/{name}/top1_pct": found["best"] and found["best"]["top1_pct"] for name, found in findings.items()}
    cost = sum(found["train_s"] for found in findings.values())
    reporter.finish({**numbers, "cost/train_s": cost}, sorted(path for path in OUTPUT_DIR.rglob("*") if path.is_file()))
    if failed := [name for name, found in findings.items() if found["best"] is None]:
        raise SweepError(f"no trial of {', '.join(failed)} finished: see {OUTPUT_DIR / 'trials.csv'}")
    return findings


def _count_trials(search: RecipeSearch) -> int:
    settings = search.settings
    count = settings.trials
    if count is None:
        count = 1 + len(search_space.PointSampler(search.space, "grid", 0).ask(1_000_000))
    return count * settings.seeds + 2 * settings.confirm_seeds


def _write_results(
    searches: Mapping[str, RecipeSearch], outcomes: Mapping[str, Sequence[TrialOutcome]], findings: Mapping[str, Any]
) -> None:
    (OUTPUT_DIR / "findings.json").write_text(json.dumps(findings, indent=2) + "\n")
    write_trials_csv(OUTPUT_DIR / "trials.csv", outcomes)
    for name, search in searches.items():
        if (best := search.best) is None:
            continue
        (OUTPUT_DIR / name).mkdir(exist_ok=True)
        confirmed = findings[name]["confirmed"]
        header = [
            f"Best recipe that sweep_recipe found for {name}: {best.outcomes[0].spec.name}, "
            f"top-1 {best.top1_pct:.2f} % in {best.outcomes[0].spec.epochs} epochs.",
            f"Under seeds {confirmed['seeds']} {_format_values(confirmed['best'])}, the run's own recipe "
            f"{_format_values(confirmed['start'])}."
            if confirmed["seeds"]
            else "Not compared with the run's own recipe under further seeds.",
        ]
        content = dump_yaml(search_space.to_override(best.point))
        (OUTPUT_DIR / name / "best.yaml").write_text("".join(f"# {line}\n" for line in header) + content)


def _format_values(values: Sequence[float | None]) -> str:
    return ", ".join("-" if value is None else f"{value:.2f}" for value in values) + " %"
