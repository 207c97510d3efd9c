"""The search for a better recipe of one run: the plan of its trials, and what came of them.

1. The search trains the run's own recipe and suggested recipes for a few epochs, in rounds.
2. The confirmation trains for all epochs of the recipe, with seeds that the search has not seen. The search's best
   replaces the run's own recipe only if it is better here. Further configurations, spread over the search's ranking,
   are trained under the first of these seeds. They only serve the rank correlation and cannot replace anything, so
   that the confirmation selects nothing.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pipeline.sweeps import analysis, engine, search_space
from pipeline.sweeps.search_space import Point
from pipeline.sweeps.sweep import Sweep
from pipeline.sweeps.trial import TRIAL_STATES, TrialOutcome, TrialSpec


@dataclass(frozen=True)
class PointResult:
    """A point of the search space and its outcomes in the search."""

    point: Point
    """Its changes to the run's own recipe; empty for the own recipe."""
    outcomes: tuple[TrialOutcome, ...]
    """One per seed."""

    @property
    def name(self) -> str:
        """Name of its first trial."""
        return self.outcomes[0].spec.name

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
        self.confirmations: dict[str, list[TrialOutcome]] = {}
        """Full-length trainings of each confirmed configuration, one per seed, by the configuration's name."""
        self._indices = itertools.count()
        self._rounds = itertools.count()
        self._seeds = itertools.count(sweep.experiment.seed_of(run_name))

    def plan_trials(self) -> engine.TrialPlan:
        """Yields the rounds of the search, then those of the confirmation."""
        yield from self._search()
        if self.settings.confirm_seeds and self.best is not None:
            yield from self._confirm(self.best)

    def _search(self) -> engine.TrialPlan:
        settings = self.settings
        searcher = search_space.PointSampler(self.space, settings.searcher, self.sweep.experiment.seed)
        seeds = list(itertools.islice(self._seeds, settings.seeds))
        points: list[Point] = [{}, *searcher.ask(min(settings.round, settings.trials or settings.round) - 1)]
        for number in self._rounds:
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
            if not points:
                return

    def _confirm(self, best: PointResult) -> engine.TrialPlan:
        """One round per seed. It ends as soon as the outcome is certain: a gain can no longer be shown.

        Ending early cannot make a test find more differences, so the rate of its errors still holds.
        """
        configurations = self._select_for_ranking(best)
        for _ in range(self.settings.confirm_seeds):
            seed, number = next(self._seeds), next(self._rounds)
            outcomes = yield [self._make_trial(c.point, seed, number, is_confirmation=True) for c in configurations]
            for configuration, outcome in zip(configurations, outcomes, strict=True):
                self.confirmations.setdefault(configuration.name, []).append(outcome)
            own_values, values = self._confirmed_top1(self.own), self._confirmed_top1(best)
            if best is self.own or None in (*own_values, *values):
                return
            if not analysis.can_become_better(_numbers(values), _numbers(own_values), self.settings.confirm_seeds):
                return
            configurations = [self.own, best]

    def _select_for_ranking(self, best: PointResult) -> list[PointResult]:
        """Own recipe and best, and further finished configurations, evenly spread over the search's ranking."""
        selected = [self.own] if best is self.own else [self.own, best]
        names = {configuration.name for configuration in selected}
        others = sorted(
            (c for c in self.configurations if c.finished and c.top1_pct is not None and c.name not in names),
            key=lambda c: -(c.top1_pct or 0.0),
        )
        count = min(self.settings.rank_configs - len(selected), len(others))
        return [*selected, *(others[(len(others) - 1) * (i + 1) // count] for i in range(count))]

    @property
    def max_search_trials(self) -> int:
        """Number of trials of the search."""
        count = self.settings.trials
        if count is None:
            count = 1 + len(search_space.PointSampler(self.space, "grid", 0).ask(1_000_000))
        return count * self.settings.seeds

    @property
    def max_confirmation_trials(self) -> int:
        """Number of trials of the confirmation if it does not end early."""
        settings = self.settings
        return settings.rank_configs + 2 * (settings.confirm_seeds - 1) if settings.confirm_seeds else 0

    def initial_trial(self, *, is_confirmation: bool = False) -> TrialSpec:
        """The run's own recipe, as a trial of the search or of the confirmation."""
        seed = self.sweep.experiment.seed_of(self.run_name)
        run, recipe = search_space.apply_point(self.sweep.experiment, self.run_name, {})
        return self.sweep.make_trial(self.run_name, 0, 0, seed, {}, run, recipe, is_confirmation=is_confirmation)

    @property
    def own(self) -> PointResult:
        """The run's own recipe."""
        return self.configurations[0]

    @property
    def best(self) -> PointResult | None:
        """The finished point with the highest mean top-1 in the search; the first of equal ones."""
        reached = [c for c in self.configurations if c.finished and c.top1_pct is not None]
        return max(reached, key=lambda c: c.top1_pct or 0.0, default=None)

    @property
    def is_confirmed(self) -> bool:
        """Whether the search's best is better than the run's own recipe under all seeds of the confirmation."""
        best = self.best
        if best is None or best is self.own:
            return False
        values, own_values = _numbers(self._confirmed_top1(best)), _numbers(self._confirmed_top1(self.own))
        return len(values) == len(own_values) == self.settings.confirm_seeds and analysis.is_better(values, own_values)

    @property
    def final_point(self) -> Point:
        """The point to train with: the search's best if it is confirmed, or else no changes to the own recipe."""
        return self.best.point if self.best and self.is_confirmed else {}

    def summarize(self) -> dict[str, Any]:
        """Returns the findings as plain JSON values."""
        best, own = self.best, self.own
        reached = [
            ({**self.initial_point, **c.point}, c.top1_pct) for c in self.configurations if c.top1_pct is not None
        ]
        all_outcomes = [*self._outcomes(), *itertools.chain.from_iterable(self.confirmations.values())]
        return {
            "search_epochs": own.outcomes[0].spec.epochs,
            "full_epochs": self.sweep.experiment.recipe(self.run_name).epochs,
            "own": {"params": self.initial_point, "top1_pct": own.top1_pct},
            "best": best
            and {
                "params": {**self.initial_point, **best.point},
                "top1_pct": best.top1_pct,
                "trial": best.name,
                "is_own": best is own,
            },
            "confirmed": {
                "seeds": [outcome.spec.seed for outcome in self.confirmations.get(own.name, [])],
                "own": self._confirmed_top1(own),
                "best": self._confirmed_top1(best) if best and best is not own else [],
            },
            "is_confirmed": self.is_confirmed,
            "ranking": self._summarize_ranking(),
            "importance": search_space.param_importances(self.space, reached),
            "log_fields": [field for field, values in self.space.items() if values.log_uniform is not None],
            "states": {state: Counter(o.state for o in all_outcomes)[state] for state in TRIAL_STATES},
            "train_s": sum(outcome.seconds for outcome in all_outcomes),
        }

    def _summarize_ranking(self) -> dict[str, Any] | None:
        """The rank correlation of the search and the first seed of the confirmation; None without a confirmation."""
        if not self.confirmations:
            return None
        ranked = [
            {
                "trial": configuration.name,
                "is_own": configuration is self.own,
                "search_top1_pct": configuration.top1_pct,
                "full_top1_pct": full,
            }
            for configuration in self.configurations
            if configuration.top1_pct is not None
            for full in self._confirmed_top1(configuration)[:1]
            if full is not None
        ]
        correlation = analysis.rank_correlation(
            [row["search_top1_pct"] for row in ranked], [row["full_top1_pct"] for row in ranked]
        )
        return {
            "configurations": ranked,
            "coefficient": correlation and correlation.coefficient,
            "p_value": correlation and correlation.p_value,
        }

    def _confirmed_top1(self, configuration: PointResult) -> list[float | None]:
        """Top-1 of its full-length trainings. A diverged one counts as 0 %, and one that failed has none."""
        return [
            0.0 if outcome.state == "diverged" else outcome.top1_pct if outcome.state == "finished" else None
            for outcome in self.confirmations.get(configuration.name, [])
        ]

    def _outcomes(self) -> Iterator[TrialOutcome]:
        return itertools.chain.from_iterable(c.outcomes for c in self.configurations)

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


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]
