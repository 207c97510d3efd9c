"""The recipe sweep: which recipe suits a model, beside the one that it has.

Every run's plan: its own recipe and suggested ones in rounds, then, under seeds that the search has not seen, its own
and the best once more. The second comparison is what the report believes: the best of many is lucky as well as good.
"""

from __future__ import annotations

import csv
import itertools
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from pipeline import pareto, space, sweep
from pipeline.config import Experiment
from pipeline.space import Point
from pipeline.trial import STATES, Outcome, Spec

logger = logging.getLogger(__name__)

FOLDER = Path("sweeps/recipe")


class SweepError(RuntimeError):
    """A sweep without a result; the message says why."""


@dataclass(frozen=True)
class Configuration:
    """A point of the space, and what it reached in the search."""

    point: Point
    """What it changes in the run's own recipe; empty for that one."""
    outcomes: tuple[Outcome, ...]
    """One for each seed."""

    @property
    def top1_pct(self) -> float | None:
        """Mean over the seeds of the best validation top-1; None where one failed or diverged."""
        ended = [o.top1_pct for o in self.outcomes if o.state in ("finished", "stopped") and o.top1_pct is not None]
        return fmean(ended) if len(ended) == len(self.outcomes) else None

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end under every seed."""
        return all(outcome.state == "finished" for outcome in self.outcomes)


class Tuning:
    """A run's plan, and what it has found so far."""

    def __init__(self, stage: sweep.Stage, run_name: str) -> None:
        self.stage, self.run_name = stage, run_name
        self.settings = stage.experiment.sweeps.recipe
        self.space = space.space_of(stage.experiment, run_name)
        self.start = space.start(stage.experiment, run_name)
        self.configurations: list[Configuration] = []
        self.confirmed: dict[str, list[Outcome]] = {"start": [], "best": []}
        self._numbers = itertools.count()

    def plan(self) -> sweep.Plan:
        """The rounds of the search, and the one that confirms its outcome."""
        settings, first = self.settings, self.stage.experiment.seed_of(self.run_name)
        searcher = space.Suggestions(self.space, settings.searcher, self.stage.experiment.seed)
        seeds = range(first, first + settings.seeds)
        points: list[Point] = [{}, *searcher.ask(min(settings.round, settings.trials or settings.round) - 1)]
        for number in itertools.count():
            if not points:
                break
            outcomes = yield [self._spec(point, seed, number) for point in points for seed in seeds]
            by_point = [tuple(outcomes[i : i + len(seeds)]) for i in range(0, len(outcomes), len(seeds))]
            found = [Configuration(point, of) for point, of in zip(points, by_point, strict=True)]
            self.configurations += found
            searcher.tell([configuration.top1_pct for configuration in found if configuration.point])
            if number == 0 and (own := found[0].top1_pct) is not None:
                searcher.add(self.start, own)
            left = None if settings.trials is None else settings.trials - len(self.configurations)
            points = searcher.ask(settings.round if left is None else min(settings.round, left)) if left != 0 else []
        best = self.best
        if best is None or not best.point or not settings.confirm_seeds:
            return
        fresh = range(seeds.stop, seeds.stop + settings.confirm_seeds)
        specs = [self._spec(p, seed, number, confirms=True) for p in ({}, best.point) for seed in fresh]
        outcomes = yield specs
        self.confirmed = {"start": outcomes[: len(fresh)], "best": outcomes[len(fresh) :]}

    def first(self) -> Spec:
        """The run's own recipe, as a trial."""
        run, recipe = space.applied(self.stage.experiment, self.run_name, {})
        return self.stage.spec(self.run_name, 0, 0, self.stage.experiment.seed_of(self.run_name), {}, run, recipe)

    @property
    def best(self) -> Configuration | None:
        """The highest mean top-1 of those that were trained to their end; of equals the earliest."""
        reached = [c for c in self.configurations if c.finished and c.top1_pct is not None]
        return max(reached, key=lambda c: c.top1_pct or 0.0, default=None)

    def finding(self) -> dict[str, Any]:
        """What was found, as plain JSON values."""
        best, own = self.best, self.configurations[0]
        confirmed = {side: [outcome.top1_pct for outcome in of] for side, of in self.confirmed.items()}
        told = {side: [value for value in values if value is not None] for side, values in confirmed.items()}
        reached = [
            ({**self.start, **c.point}, c.top1_pct) for c in self.configurations if c.top1_pct is not None
        ]
        everything = [*self.confirmed["start"], *self.confirmed["best"],
                      *(outcome for c in self.configurations for outcome in c.outcomes)]
        return {
            "own": {"params": self.start, "top1_pct": own.top1_pct},
            "best": best and {"params": {**self.start, **best.point}, "top1_pct": best.top1_pct,
                              "trial": best.outcomes[0].spec.name, "is_own": not best.point},
            "confirmed": {**confirmed, "seeds": [outcome.spec.seed for outcome in self.confirmed["best"]]},
            "beyond_spread": pareto.beyond_spread(told["best"], told["start"]),
            "importance": space.importances(self.space, reached),
            "log_fields": [field for field, values in self.space.items() if values.log_uniform is not None],
            "states": {state: Counter(o.state for o in everything)[state] for state in STATES},
            "train_s": sum(outcome.seconds for outcome in everything),
        }

    def _spec(self, point: Point, seed: int, round: int, *, confirms: bool = False) -> Spec:
        run, recipe = space.applied(self.stage.experiment, self.run_name, point)
        return self.stage.spec(self.run_name, next(self._numbers), round, seed, {**self.start, **point}, run, recipe,
                               confirms=confirms)


def sweep_recipe(experiment: Experiment) -> dict[str, Any]:
    """Runs the sweep, or goes on with it, and writes sweeps/recipe/. Returns its findings, a run's under its name.

    Raises:
        ConfigError, ShardError, ClusterError: what is wrong with the parameters, the data, the cluster.
        SweepError: no trial of a run was trained to its end.
    """
    space.check(experiment)
    settings = experiment.sweeps.recipe
    stage = sweep.Stage(experiment, "recipe", settings)
    tunings = {name: Tuning(stage, name) for name in settings.runs}
    findings: dict[str, Any] = {}
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not tunings:
        _write(tunings, {}, findings)
        return findings
    trials = sum(_num_trials(tuning) for tuning in tunings.values())
    stage.announce(trials, [tuning.first() for tuning in tunings.values()])
    outcomes, board = sweep.run(
        stage, {name: tuning.plan() for name, tuning in tunings.items()}, trials=trials, asha=settings.asha
    )
    findings = {name: tuning.finding() for name, tuning in tunings.items()}
    _write(tunings, outcomes, findings)

    from pipeline import sweep_figures  # matplotlib, which the trials' processes need not import

    pictures = sweep_figures.recipe(FOLDER)
    for picture in pictures:
        (FOLDER / f"{picture.name}.png").write_bytes(picture.png)
    numbers = {f"best/{name}/top1_pct": found["best"] and found["best"]["top1_pct"] for name, found in findings.items()}
    cost = sum(found["train_s"] for found in findings.values())
    board.close({**numbers, "cost/train_s": cost}, sorted(path for path in FOLDER.rglob("*") if path.is_file()))
    if failed := [name for name, found in findings.items() if found["best"] is None]:
        raise SweepError(f"no trial of {', '.join(failed)} was trained to its end: see {FOLDER / 'trials.csv'}")
    return findings


def _num_trials(tuning: Tuning) -> int:
    settings = tuning.settings
    count = settings.trials
    if count is None:
        count = 1 + len(space.Suggestions(tuning.space, "grid", 0).ask(1_000_000))
    return count * settings.seeds + 2 * settings.confirm_seeds


def _write(
    tunings: Mapping[str, Tuning], outcomes: Mapping[str, Sequence[Outcome]], findings: Mapping[str, Any]
) -> None:
    (FOLDER / "findings.json").write_text(json.dumps(findings, indent=2) + "\n")
    write_trials(FOLDER / "trials.csv", outcomes)
    for name, tuning in tunings.items():
        if (best := tuning.best) is None:
            continue
        (FOLDER / name).mkdir(exist_ok=True)
        confirmed = findings[name]["confirmed"]
        header = [
            f"What sweep_recipe found best for {name}: {best.outcomes[0].spec.name}, "
            f"top-1 {best.top1_pct:.2f} % in {best.outcomes[0].spec.epochs} epochs.",
            f"Under seeds {confirmed['seeds']} {_listed(confirmed['best'])}, the run's own recipe "
            f"{_listed(confirmed['start'])}."
            if confirmed["seeds"] else "Not compared with the run's own recipe under further seeds.",
        ]
        content = yaml.safe_dump(space.override(best.point), sort_keys=False)
        (FOLDER / name / "best.yaml").write_text("".join(f"# {line}\n" for line in header) + content)


def write_trials(path: Path, outcomes: Mapping[str, Sequence[Outcome]]) -> None:
    """A row per trial, in the order of their plans."""
    ended = [outcome for of in outcomes.values() for outcome in of]
    fields = list(dict.fromkeys(field for outcome in ended for field in outcome.spec.params))
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["trial", "run", "round", "seed", "state", "top1_pct", "epochs", "seconds", "confirms",
                        *fields, "message"])
        for outcome in ended:
            spec = outcome.spec
            top1 = "" if outcome.top1_pct is None else f"{outcome.top1_pct:.4f}"
            values = ["" if (value := spec.params.get(field)) is None else value for field in fields]
            table.writerow([spec.name, spec.plan, spec.round, spec.seed, outcome.state, top1, len(outcome.rows),
                            f"{outcome.seconds:.1f}", int(spec.confirms), *values, outcome.message or ""])


def _listed(values: Sequence[float | None]) -> str:
    return ", ".join("-" if value is None else f"{value:.2f}" for value in values) + " %"
