"""Which run is compared with which: seeds of a network; E, H, S with X; E, H with S; a tuned recipe with its base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flopeq.groups import GROUPS
from flopeq.registry import ARGS_OF_SYMMETRY, describe
from flopeq.square import symmetry_group
from pipeline.base.config import Experiment
from pipeline.base.schema import SymmetrizedRun

NON_SHAPE_ARGS = (*ARGS_OF_SYMMETRY, "init_values", "ls_init_value")
"""Arguments in which X and its E may differ."""


def seed_group(experiment: Experiment, name: str) -> str:
    """Returns the first run that differs from this one only in its seed, or the run itself."""
    if name in experiment.symmetrized:
        return _symmetrized_seed_group(experiment, name)
    run = experiment.run(name)
    return next(
        other
        for other, other_run in experiment.models.items()
        if other_run.model_copy(update={"seed": run.seed}) == run
    )


def baseline_of(experiment: Experiment, name: str) -> str | None:
    """Returns the X that an E or H is compared with: same size and arguments, then nearest in recipe and seed.

    A symmetrized run is compared with the run whose weights it uses.
    """
    if name in experiment.symmetrized:
        return experiment.symmetrized[name].weights_of
    run = experiment.run(name)
    info = describe(run.model)
    if info is None or info.variant == "X":
        return None
    key = ("X", info.family, info.size, _shape_args(run.args))
    candidates = []
    for other, candidate in experiment.models.items():
        candidate_info = describe(candidate.model)
        if (
            candidate_info
            and (candidate_info.variant, candidate_info.family, candidate_info.size, _shape_args(candidate.args)) == key
        ):
            same_seed = experiment.seed_of(other) == experiment.seed_of(name)
            candidates.append((2 * _same_base_recipe(experiment, run.recipe, candidate.recipe) + same_seed, other))
    return max(candidates, key=lambda fit: fit[0])[1] if candidates else None


def comparison_groups(experiment: Experiment) -> list[list[str]]:
    """Returns all runs, each X together with the runs that are compared with it."""
    groups: dict[str, list[str]] = {}
    for name in experiment.run_names:
        root = name
        while (baseline := baseline_of(experiment, root)) is not None:
            root = baseline
        groups.setdefault(root, []).append(name)
    return list(groups.values())


def symmetrized_baseline_of(experiment: Experiment, name: str) -> str | None:
    """Returns the symmetrized run of the X that a network is compared with: the first over the network's group, or
    else the first.
    """
    if name in experiment.symmetrized:
        return None
    baseline = baseline_of(experiment, name)
    runs = {other: run for other, run in experiment.symmetrized.items() if run.weights_of == baseline}
    info = describe(experiment.run(name).model)
    elements = GROUPS[info.group].elements if info and info.group else ()
    same_group = [other for other, run in runs.items() if symmetry_group(run.group) == elements]
    return next(iter((*same_group, *runs)), None)


def own_recipe_run_of(experiment: Experiment, name: str) -> str | None:
    """Returns the run of the same network with the recipe that the run's recipe was tuned from; same seed preferred."""
    run = experiment.run(name)
    if run.recipe not in experiment.sweeps.tuned or name in experiment.symmetrized:
        return None
    base = experiment.sweeps.tuned[run.recipe].base
    candidates = [
        other
        for other, candidate in experiment.models.items()
        if (candidate.model, candidate.recipe, _shape_args(candidate.args)) == (run.model, base, _shape_args(run.args))
    ]
    same_seed = [other for other in candidates if experiment.seed_of(other) == experiment.seed_of(name)]
    return next(iter(same_seed or candidates), None)


def _symmetrized_seed_group(experiment: Experiment, name: str) -> str:
    def key(run: SymmetrizedRun) -> SymmetrizedRun:
        return run.model_copy(update={"weights_of": seed_group(experiment, run.weights_of)})

    runs = experiment.symmetrized
    return next(other for other, other_run in runs.items() if key(other_run) == key(runs[name]))


def _same_base_recipe(experiment: Experiment, recipe: str, other: str) -> bool:
    """Whether both are the same recipe, or were tuned from the same base."""
    tuned = experiment.sweeps.tuned
    if recipe in tuned and other in tuned:
        return tuned[recipe].base == tuned[other].base
    return recipe == other


def _shape_args(args: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in args.items() if key not in NON_SHAPE_ARGS}
