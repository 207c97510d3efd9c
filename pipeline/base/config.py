"""The typed model of params.yaml. An experiment is validated before any long computation starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pipeline.base.errors import ConfigError, did_you_mean
from pipeline.base.scaling_params import Scaling
from pipeline.base.schema import (
    Data,
    NameStr,
    Recipe,
    RecipeOverride,
    Run,
    Section,
    Sweeps,
    SymmetrizedRun,
    Throughput,
    Tracking,
    Train,
    TunedRecipe,
)
from pipeline.base.yaml_files import read_yaml

_SET_BY_BUDGET = {"epochs", "warmup_epochs", "cooldown_epochs", "schedule_step"}


class Experiment(Section):
    seed: int
    """Seed of the data order and of every run without a `seed` of its own."""
    data: Data
    models: dict[NameStr, Run]
    """Runs by name: the model to train and its recipe."""
    symmetrized: dict[NameStr, SymmetrizedRun]
    """Symmetrized runs by name: trained runs of `models`, made invariant to a group of symmetries without training."""
    recipes: dict[NameStr, Recipe]
    """Training recipes by name."""
    train: Train
    throughput: Throughput
    sweeps: Sweeps
    scaling: Scaling | None
    """The scaling study. None leaves it out."""
    tracking: Tracking
    storage: str
    """Folder or pyarrow URL for checkpoints, which are written to `<storage>/<run>/checkpoints`."""

    @property
    def run_names(self) -> list[str]:
        """The names of all runs, the symmetrized ones last."""
        return [*self.models, *self.symmetrized]

    def run(self, name: str) -> Run:
        """Returns the run of that name; for a symmetrized run, the run whose weights it uses.

        Raises: ConfigError, with the closest known name, if there is no such run.
        """
        return self.models[self.trained_name(name)]

    def trained_name(self, name: str) -> str:
        """Returns the name of the run that is trained for this one: its own, or `weights_of` of a symmetrized run.

        Raises: ConfigError, with the closest known name, if there is no such run.
        """
        if name not in self.run_names:
            raise ConfigError(f"no run named {name!r} in params.yaml{did_you_mean(name, self.run_names)}")
        return self.symmetrized[name].weights_of if name in self.symmetrized else name

    def check_is_trained(self, name: str) -> None:
        """Raises: ConfigError if there is no such run, or if it is a symmetrized run, which has no training."""
        if (trained := self.trained_name(name)) != name:
            raise ConfigError(
                f"{name} is not trained: it has the weights of {trained}, symmetrized. To evaluate it, run "
                f"`dvc repro symmetrize@{name}`"
            )

    def recipe(self, name: str) -> Recipe:
        """Returns the recipe of a run.

        Raises: ConfigError if a sweep has not found the recipe yet.
        """
        recipe = self.run(name).recipe
        if recipe not in self.recipes:
            path = self.sweeps.tuned[recipe].override
            raise ConfigError(
                f"recipe {recipe!r} of run {name!r} needs {path}, which does not exist: run `dvc repro train@{name}`"
            )
        return self.recipes[recipe]

    def seed_of(self, name: str) -> int:
        """Returns the seed of a run: its own, or else the experiment's."""
        seed = self.run(name).seed
        return self.seed if seed is None else seed

    def resolved(self, name: str) -> dict[str, Any]:
        """Returns everything that defines a run, as plain JSON values."""
        run, symmetrized = self.run(name), self.symmetrized.get(name)
        return {
            "run": name,
            **({} if symmetrized is None else {"symmetrize": symmetrized.model_dump(mode="json")}),
            "model": run.model,
            "args": dict(run.args),
            "seed": self.seed_of(name),
            "data": self.data.model_dump(mode="json"),
            "recipe": {"name": run.recipe, **self.recipe(name).model_dump(mode="json")},
            "train": self.train.model_dump(mode="json"),
        }


def load_experiment(path: Path | str = "params.yaml") -> Experiment:
    """Reads and validates an experiment.

    Raises: ConfigError with one line per mistake.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path} not found: run this from the root of the repository")
    content = read_yaml(path)
    if shared := _find_shared_sections(content):
        raise ConfigError("\n".join(f"{path}: {line}" for line in shared))
    try:
        experiment = Experiment.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in _format_validation_errors(error))) from None
    if problems := _find_inconsistencies(experiment):
        raise ConfigError("\n".join(f"{path}: {line}" for line in problems))
    return _apply_tuned_recipes(experiment, path.parent)


def override_recipe(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Returns a copy of the recipe with some fields changed, validated again.

    Raises: ConfigError with one line per mistake.
    """
    try:
        return Recipe.model_validate({**recipe.model_dump(), **changes})
    except ValidationError as error:
        raise ConfigError("\n".join(_format_validation_errors(error, Recipe))) from None


def load_override(tuned: TunedRecipe, root: Path = Path()) -> RecipeOverride:
    """Reads the override file of a tuned recipe.

    Args:
        root: folder to which the path of the file is relative.
    Raises: ConfigError if the file is invalid.
    """
    path = root / tuned.override
    try:
        return RecipeOverride.model_validate(read_yaml(path) or {})
    except ValidationError as error:
        raise ConfigError(
            "\n".join(f"{path}: {line}" for line in _format_validation_errors(error, RecipeOverride))
        ) from None


def _find_shared_sections(content: Any) -> list[str]:
    """Returns one line per section that an alias shares with another: DVC's `-S` would change both, or neither."""
    first_path, lines = {}, []

    def visit(section: Any, key_path: str) -> None:
        if not isinstance(section, Mapping):
            return
        if id(section) in first_path:
            lines.append(
                f"{key_path} is an alias of {first_path[id(section)]}, so `dvc exp run -S` could not change one of the "
                f"two: write {{<<: *name}} instead of *name, which copies the section"
            )
            return
        first_path[id(section)] = key_path
        for key, value in section.items():
            visit(value, f"{key_path}.{key}" if key_path else str(key))

    visit(content, "")
    return lines


def _find_inconsistencies(experiment: Experiment) -> list[str]:
    """Returns one line per reference to a run or recipe that does not exist, and per contradiction."""
    sweeps, known, problems = experiment.sweeps, [*experiment.recipes, *experiment.sweeps.tuned], []
    for name, run in experiment.models.items():
        if run.recipe not in known:
            problems.append(f"models.{name}.recipe: no recipe named {run.recipe!r}{did_you_mean(run.recipe, known)}")
    problems += _find_symmetrized_problems(experiment)
    for name, tuned in sweeps.tuned.items():
        if name in experiment.recipes:
            problems.append(f"sweeps.tuned.{name}: `recipes` already has this name; choose another")
        if tuned.base not in experiment.recipes:
            problems.append(
                f"sweeps.tuned.{name}.base: no recipe named {tuned.base!r}"
                f"{did_you_mean(tuned.base, experiment.recipes)}"
            )
    for key_path, names in (("recipe.runs", sweeps.recipe.runs), ("hybrid.runs", sweeps.hybrid.runs)):
        for name in names:
            if name not in experiment.models:
                problems.append(f"sweeps.{key_path}: no run named {name!r}{did_you_mean(name, experiment.models)}")
            elif experiment.models[name].recipe in sweeps.tuned:
                problems.append(f"sweeps.{key_path}: {name} has a recipe from a sweep; it needs one of `recipes`")
    for name in sweeps.recipe.own_space:
        if name not in sweeps.recipe.runs:
            problems.append(f"sweeps.recipe.own_space.{name}: not one of sweeps.recipe.runs")
    if (sweeps.recipe.trials is None) != (sweeps.recipe.searcher == "grid"):
        problems.append("sweeps.recipe.trials: must be a number for optuna and random, and null for grid")
    return problems + _find_scaling_problems(experiment)


def _find_symmetrized_problems(experiment: Experiment) -> list[str]:
    """Returns one line per symmetrized run that has the name of another run, or no trained run for its weights."""
    problems = []
    for name, symmetrized in experiment.symmetrized.items():
        source = symmetrized.weights_of
        if name in experiment.models:
            problems.append(f"symmetrized.{name}: `models` already has this name; choose another")
        if source in experiment.symmetrized:
            problems.append(
                f"symmetrized.{name}.weights_of: {source} is symmetrized itself and has no weights of its own; "
                f"name one of `models`"
            )
        elif source not in experiment.models:
            problems.append(
                f"symmetrized.{name}.weights_of: no run named {source!r}{did_you_mean(source, experiment.models)}"
            )
    return problems


def _find_scaling_problems(experiment: Experiment) -> list[str]:
    """Returns one line per reference to an arm, size or recipe that does not exist, and per change to no recipe."""
    scaling, problems = experiment.scaling, []
    if scaling is None:
        return problems
    names: list[tuple[str, str, Mapping[str, Any], str]] = [
        ("recipe", scaling.recipe, experiment.recipes, "recipe in `recipes`"),
        ("baseline", scaling.baseline, scaling.arms, "arm"),
        ("equivariant", scaling.equivariant, scaling.arms, "arm"),
    ]
    if scaling.augmented is not None:
        names.append(("augmented", scaling.augmented, scaling.arms, "arm"))
    if scaling.unique_images is not None:
        names.append(("unique_images.size", scaling.unique_images.size, scaling.sizes, "size"))
    for field, name, known, kind in names:
        if name not in known:
            problems.append(f"scaling.{field}: no {kind} named {name!r}{did_you_mean(name, known)}")
    for name, arm in scaling.arms.items() if scaling.recipe in experiment.recipes else ():
        problems += [
            f"scaling.arms.{name}.recipe.{field}: a budget sets it" for field in _SET_BY_BUDGET & {*arm.recipe}
        ]
        try:
            override_recipe(experiment.recipes[scaling.recipe], arm.recipe)
        except ConfigError as error:
            problems += [f"scaling.arms.{name}.recipe: {line}" for line in str(error).splitlines()]
    return problems


def _apply_tuned_recipes(experiment: Experiment, root: Path) -> Experiment:
    """Adds the recipes that sweeps have found so far, and applies their changes to the arguments of the models."""
    recipes, models = dict(experiment.recipes), dict(experiment.models)
    for name, tuned in experiment.sweeps.tuned.items():
        if not (root / tuned.override).is_file():
            continue
        override = load_override(tuned, root)
        try:
            recipes[name] = override_recipe(recipes[tuned.base], override.recipe)
        except ConfigError as error:
            raise ConfigError(f"{tuned.override}: {error}") from None
        for run_name, run in models.items():
            if run.recipe == name:
                models[run_name] = run.model_copy(update={"args": {**run.args, **override.args}})
    return experiment.model_copy(update={"recipes": recipes, "models": models})


def _format_validation_errors(error: ValidationError, model: type[BaseModel] = Experiment) -> list[str]:
    lines = []
    for details in error.errors():
        key_path = [str(part) for part in details["loc"] if part != "[key]"]
        if details["type"] == "extra_forbidden":
            lines.append(
                f"{'.'.join(key_path)}: unknown parameter"
                f"{did_you_mean(key_path[-1], _field_names_at(model, key_path[:-1]))}"
            )
        elif details["type"] == "missing":
            lines.append(f"{'.'.join(key_path)}: missing")
        else:
            lines.append(f"{'.'.join(key_path)}: {details['msg']}, got {details['input']!r}")
    return lines


def _field_names_at(model: Any, key_path: list[str]) -> list[str]:
    """Returns the field names of the section at `key_path`, or nothing if the value there may have several types."""
    for part in key_path:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        inner = field.annotation if field else model
        model = get_args(inner)[1] if get_origin(inner) is dict else inner
        model = next((arg for arg in get_args(model) if hasattr(arg, "model_fields")), model)
    return list(getattr(model, "model_fields", ()))
