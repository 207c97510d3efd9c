"""The search space of a recipe sweep: its points, their application to a run, and the sampler."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning

from flopeq.models.build import ModelError
from pipeline.base.config import Experiment, override_recipe
from pipeline.base.errors import ConfigError, did_you_mean
from pipeline.base.schema import Range, Recipe, Run
from pipeline.training import recipe

Point = Mapping[str, Any]
"""Field -> value; a field is one of Recipe's, or `args.<name>`."""

ARGS_PREFIX = "args."

_FIXED_FIELDS = ("epochs", "global_batch_size")  # varying these would change the number of samples that a trial sees

_NUM_CHECKED_POINTS = 64  # points that are checked before anything starts

_TPE_STARTUP_TRIALS = 4  # random points before the TPE uses results

optuna.logging.set_verbosity(optuna.logging.WARNING)


def search_space_of(experiment: Experiment, run_name: str) -> dict[str, Range]:
    """Returns the fields that are varied for a run, those common to all runs first."""
    sweep = experiment.sweeps.recipe
    return {**sweep.space, **sweep.own_space.get(run_name, {})}


def initial_point(experiment: Experiment, run_name: str) -> dict[str, Any]:
    """Returns the run's own values of the varied fields; None for an argument that the run does not set."""
    values = experiment.recipe(run_name).model_dump()
    args = experiment.run(run_name).args
    return {
        field: args.get(field.removeprefix(ARGS_PREFIX)) if field.startswith(ARGS_PREFIX) else values[field]
        for field in search_space_of(experiment, run_name)
    }


def to_override(point: Point) -> dict[str, dict[str, Any]]:
    """Returns a point in the format of an override file: {"recipe": {...}, "args": {...}}."""
    return {
        "recipe": {field: value for field, value in point.items() if not field.startswith(ARGS_PREFIX)},
        "args": {
            field.removeprefix(ARGS_PREFIX): value for field, value in point.items() if field.startswith(ARGS_PREFIX)
        },
    }


def apply_point(experiment: Experiment, run_name: str, point: Point) -> tuple[Run, Recipe]:
    """Returns the run and its recipe with the values of a point. Raises: ConfigError for invalid values."""
    changes, run = to_override(point), experiment.run(run_name)
    run = run.model_copy(update={"args": {**run.args, **changes["args"]}})
    return run, override_recipe(experiment.recipe(run_name), changes["recipe"])


def check_search_space(experiment: Experiment) -> None:
    """Checks the bounds of every field, and some points of every run's space, without training.

    Raises: ConfigError, which names the field, or the point if only the combination is invalid.
    """
    sweep = experiment.sweeps.recipe
    for run_name in sweep.runs:
        space = search_space_of(experiment, run_name)
        for field, values in space.items():
            where = f"sweeps.recipe.space: {field}"
            if field in _FIXED_FIELDS:
                raise ConfigError(f"{where} is the same for all trials: set it in the recipe")
            if not field.startswith(ARGS_PREFIX) and field not in Recipe.model_fields:
                known = (*Recipe.model_fields, *(f"{ARGS_PREFIX}{name}" for name in experiment.run(run_name).args))
                raise ConfigError(
                    f"{where} is neither a field of a recipe nor {ARGS_PREFIX}<name>{did_you_mean(field, known)}"
                )
            if sweep.searcher == "grid" and values.choice is None and values.integer is None:
                raise ConfigError(f"{where}: a grid needs choices or integers")
            for value in values.bounds:
                try:
                    _check_point(experiment, run_name, {field: value})
                except ConfigError as error:
                    raise ConfigError(f"{where}: {value!r} for run {run_name}: {error}") from None
        for point in PointSampler(space, "grid" if sweep.searcher == "grid" else "random", experiment.seed).ask(
            _NUM_CHECKED_POINTS
        ):
            try:
                _check_point(experiment, run_name, point)
            except ConfigError as error:
                raise ConfigError(f"sweeps.recipe.space: run {run_name} with {dict(point)}: {error}") from None


def _check_point(experiment: Experiment, run_name: str, point: Point) -> None:
    run, changed = apply_point(experiment, run_name, point)
    settings = experiment.sweeps.recipe
    recipe.check_recipe(changed, experiment.data, experiment.train.model_copy(update={"workers": settings.workers}))
    if to_override(point)["args"] or changed.drop_path:
        try:
            recipe.build_model(run, changed, num_classes=10, seed=0, device="meta")
        except ModelError as error:
            raise ConfigError(str(error)) from None


class PointSampler:
    """Samples points of a space in rounds, as a pure function of the seed and of the results so far.

    Optuna's sampler is asked for a whole round before it gets any of its results, so the order in which the trials of
    a round end does not matter.
    """

    def __init__(self, space: Mapping[str, Range], searcher: str, seed: int) -> None:
        self._space = space
        self._grid = _grid_points(space) if searcher == "grid" else None
        self._distributions = {field: _to_distribution(values) for field, values in space.items()}
        self.study = optuna.create_study(direction="maximize", sampler=_build_sampler(searcher, seed))
        self._asked: list[optuna.Trial] = []

    def ask(self, count: int) -> list[Point]:
        """Returns the next points; fewer, or none, when a grid is exhausted."""
        if self._grid is not None:
            return list(itertools.islice(self._grid, count))
        self._asked = [self.study.ask(self._distributions) for _ in range(count)]
        return [
            {field: _from_optuna(self._space[field], drawn) for field, drawn in trial.params.items()}
            for trial in self._asked
        ]

    def tell(self, top1_pct: Sequence[float | None]) -> None:
        """Adds the results of the last round, in the order of its points; None: failed."""
        for trial, value in zip(self._asked, top1_pct, strict=False):
            state = optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
            self.study.tell(trial, value, state=state)

    def add(self, point: Point, top1_pct: float) -> None:
        """Adds the result of a point that the sampler did not suggest. A point outside the space is ignored."""
        try:
            drawn = {field: _to_optuna(self._space[field], value) for field, value in point.items()}
        except ValueError:
            return
        if all(_contains(self._distributions[field], value) for field, value in drawn.items()):
            self.study.add_trial(
                optuna.trial.create_trial(params=drawn, distributions=self._distributions, value=top1_pct)
            )


def param_importances(space: Mapping[str, Range], results: Sequence[tuple[Point, float]]) -> dict[str, float]:
    """Returns each field's share of the variance of top-1 by Optuna's fANOVA, largest first; {} if there is none."""
    sampler = PointSampler(space, "random", 0)
    for point, top1_pct in results:
        sampler.add(point, top1_pct)
    if len({trial.value for trial in sampler.study.trials}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    importances = optuna.importance.get_param_importances(sampler.study, evaluator=evaluator)
    return {field: float(share) for field, share in importances.items()}


def _build_sampler(searcher: str, seed: int) -> optuna.samplers.BaseSampler:
    if searcher != "optuna":
        return optuna.samplers.RandomSampler(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # constant_liar makes the points of a round differ
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_TPE_STARTUP_TRIALS, constant_liar=True)


def _grid_points(space: Mapping[str, Range]) -> Iterator[Point]:
    def values(of: Range) -> Sequence[Any]:
        return of.choice if of.choice is not None else range(of.bounds[0], of.bounds[1] + 1)

    combinations = itertools.product(*(values(of) for of in space.values()))
    return (dict(zip(space, combination, strict=True)) for combination in combinations)


def _to_distribution(values: Range) -> BaseDistribution:
    """Choices by their number, as Optuna takes no lists for values."""
    if values.choice is not None:
        return CategoricalDistribution(range(len(values.choice)))
    if values.integer is not None:
        return IntDistribution(*values.integer)
    return FloatDistribution(*values.bounds, log=values.log_uniform is not None)


def _from_optuna(of: Range, drawn: Any) -> Any:
    """As people would write it: numbers to four digits."""
    if of.choice is not None:
        return of.choice[drawn]
    low, high = of.bounds
    return drawn if isinstance(drawn, int) else min(max(float(f"{drawn:.4g}"), low), high)


def _to_optuna(of: Range, value: Any) -> Any:
    """Raises: ValueError for a value that is not a number or not one of the choices."""
    if of.choice is not None:
        return of.choice.index(value)
    if not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    return value


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    return distribution._contains(distribution.to_internal_repr(value))
