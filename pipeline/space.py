"""The space of a recipe sweep: points in it, what they make of a run, and who suggests the next ones."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning

from flopeq.build import ModelError
from pipeline import recipe
from pipeline.config import ConfigError, Experiment, Range, Recipe, Run, nearest, overridden

Point = Mapping[str, Any]
"""Field -> value; a field is one of Recipe's, or `args.<name>`."""

ARGS = "args."
_FIXED = ("epochs", "global_batch_size")  # with these, trials would differ in the samples they have seen
_PROBES = 64  # points of a space that are tried out before anything starts
_STARTUP = 4  # points that chance draws before the TPE goes by what they reached

optuna.logging.set_verbosity(optuna.logging.WARNING)


def space_of(experiment: Experiment, run_name: str) -> dict[str, Range]:
    """What is varied for a run: first what is varied for all."""
    sweep = experiment.sweeps.recipe
    return {**sweep.space, **sweep.own_space.get(run_name, {})}


def start(experiment: Experiment, run_name: str) -> dict[str, Any]:
    """The run's own values of the fields that are varied; None for an argument that it leaves to the model."""
    values = experiment.recipe(run_name).model_dump()
    args = experiment.run(run_name).args
    return {
        field: args.get(field.removeprefix(ARGS)) if field.startswith(ARGS) else values[field]
        for field in space_of(experiment, run_name)
    }


def override(point: Point) -> dict[str, dict[str, Any]]:
    """A point as an override file has it: {"recipe": {...}, "args": {...}}."""
    return {
        "recipe": {field: value for field, value in point.items() if not field.startswith(ARGS)},
        "args": {field.removeprefix(ARGS): value for field, value in point.items() if field.startswith(ARGS)},
    }


def applied(experiment: Experiment, run_name: str, point: Point) -> tuple[Run, Recipe]:
    """The run and its recipe with the values of a point. Raises: ConfigError for values that the recipe refuses."""
    changes, run = override(point), experiment.run(run_name)
    run = run.model_copy(update={"args": {**run.args, **changes["args"]}})
    return run, overridden(experiment.recipe(run_name), changes["recipe"])


def check(experiment: Experiment) -> None:
    """Tries the extremes of every field, and some points of every run's space, without training.

    Raises: ConfigError, naming the field, or the point where only a combination is wrong.
    """
    sweep = experiment.sweeps.recipe
    for run_name in sweep.runs:
        space = space_of(experiment, run_name)
        for field, values in space.items():
            where = f"sweeps.recipe.space: {field}"
            if field in _FIXED:
                raise ConfigError(f"{where} is the same for all trials: set it in the recipe")
            if not field.startswith(ARGS) and field not in Recipe.model_fields:
                known = (*Recipe.model_fields, *(f"{ARGS}{name}" for name in experiment.run(run_name).args))
                raise ConfigError(f"{where} is neither a field of a recipe nor {ARGS}<name>{nearest(field, known)}")
            if sweep.searcher == "grid" and values.choice is None and values.integer is None:
                raise ConfigError(f"{where}: a grid needs choices or whole numbers")
            for value in values.extremes:
                try:
                    _try(experiment, run_name, {field: value})
                except ConfigError as error:
                    raise ConfigError(f"{where}: {value!r} for run {run_name}: {error}") from None
        for point in Suggestions(space, "grid" if sweep.searcher == "grid" else "random", experiment.seed).ask(_PROBES):
            try:
                _try(experiment, run_name, point)
            except ConfigError as error:
                raise ConfigError(f"sweeps.recipe.space: run {run_name} with {dict(point)}: {error}") from None


def _try(experiment: Experiment, run_name: str, point: Point) -> None:
    run, changed = applied(experiment, run_name, point)
    settings = experiment.sweeps.recipe
    recipe.check(changed, experiment.data, experiment.train.model_copy(update={"workers": settings.workers}))
    if override(point)["args"] or changed.drop_path:
        try:
            recipe.model(run, changed, num_classes=10, seed=0, device="meta")
        except ModelError as error:
            raise ConfigError(str(error)) from None


class Suggestions:
    """Points of a space, one round after the other: a pure function of the seed and of what was told before.

    Optuna's samplers are asked for a whole round before anything of it is told, which is why it matters in no way
    which trial of a round ends first.
    """

    def __init__(self, space: Mapping[str, Range], searcher: str, seed: int) -> None:
        self._space = space
        self._grid = _grid(space) if searcher == "grid" else None
        self._distributions = {field: _distribution(values) for field, values in space.items()}
        self.study = optuna.create_study(direction="maximize", sampler=_sampler(searcher, seed))
        self._asked: list[optuna.Trial] = []

    def ask(self, count: int) -> list[Point]:
        """The next points; fewer, in the end none, where a grid is used up."""
        if self._grid is not None:
            return list(itertools.islice(self._grid, count))
        self._asked = [self.study.ask(self._distributions) for _ in range(count)]
        return [
            {field: _value(self._space[field], drawn) for field, drawn in trial.params.items()}
            for trial in self._asked
        ]

    def tell(self, top1_pct: Sequence[float | None]) -> None:
        """What the points of the last round reached, in their order; None: the trial failed."""
        for trial, value in zip(self._asked, top1_pct, strict=False):
            state = optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
            self.study.tell(trial, value, state=state)

    def add(self, point: Point, top1_pct: float) -> None:
        """What a point reached that nobody suggested; one outside of the space is passed over."""
        try:
            drawn = {field: _drawn(self._space[field], value) for field, value in point.items()}
        except ValueError:
            return
        if all(_holds(self._distributions[field], value) for field, value in drawn.items()):
            self.study.add_trial(optuna.trial.create_trial(
                params=drawn, distributions=self._distributions, value=top1_pct
            ))


def importances(space: Mapping[str, Range], reached: Sequence[tuple[Point, float]]) -> dict[str, float]:
    """Each field's share in the variance of top-1 by Optuna's fANOVA, largest first; empty where it finds none."""
    suggested = Suggestions(space, "random", 0)
    for point, top1_pct in reached:
        suggested.add(point, top1_pct)
    if len({trial.value for trial in suggested.study.trials}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found = optuna.importance.get_param_importances(suggested.study, evaluator=evaluator)
    return {field: float(share) for field, share in found.items()}


def _sampler(searcher: str, seed: int) -> optuna.samplers.BaseSampler:
    if searcher != "optuna":
        return optuna.samplers.RandomSampler(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # constant_liar keeps the points of a round apart
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP, constant_liar=True)


def _grid(space: Mapping[str, Range]) -> Iterator[Point]:
    def values(of: Range) -> Sequence[Any]:
        return of.choice if of.choice is not None else range(of.extremes[0], of.extremes[1] + 1)

    combinations = itertools.product(*(values(of) for of in space.values()))
    return (dict(zip(space, combination, strict=True)) for combination in combinations)


def _distribution(values: Range) -> BaseDistribution:
    """Choices by their number, as Optuna takes no lists for values."""
    if values.choice is not None:
        return CategoricalDistribution(range(len(values.choice)))
    if values.integer is not None:
        return IntDistribution(*values.integer)
    return FloatDistribution(*values.extremes, log=values.log_uniform is not None)


def _value(of: Range, drawn: Any) -> Any:
    """As people would write it: numbers to four digits."""
    if of.choice is not None:
        return of.choice[drawn]
    low, high = of.extremes
    return drawn if isinstance(drawn, int) else min(max(float(f"{drawn:.4g}"), low), high)


def _drawn(of: Range, value: Any) -> Any:
    """Raises: ValueError for a value that is no number, or none of the choices."""
    if of.choice is not None:
        return of.choice.index(value)
    if not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    return value


def _holds(distribution: BaseDistribution, value: Any) -> bool:
    return distribution._contains(distribution.to_internal_repr(value))
