"""Sweeps: what a space may hold, the same trials whatever happens on the way, and what comes of them."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.base import config, schema
from pipeline.base.errors import ConfigError
from pipeline.base.yaml_files import dump_yaml, read_yaml
from pipeline.sweeps import search_space
from stages import resolve

ROOT = Path(__file__).resolve().parents[2]

SPACE = {"lr": {"log_uniform": [1e-4, 1e-2]}, "args.init_values": {"choice": [0.1, 1.0]}}


@pytest.fixture
def params() -> dict[str, Any]:
    return read_yaml(ROOT / "params.yaml")


@pytest.fixture
def load(tmp_path: Path, params: dict[str, Any]) -> Callable[..., config.Experiment]:
    """The committed experiment with other settings of its recipe sweep."""

    def load(**changes: Any) -> config.Experiment:
        changed = copy.deepcopy(params)
        changed["sweeps"]["recipe"].update(changes)
        (tmp_path / "params.yaml").write_text(dump_yaml(changed))
        return config.load_experiment(tmp_path / "params.yaml")

    return load


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"uniform": [1.0, 0.5]}, "lr: .*first number must be below the second"),
        ({"log_uniform": [0.0, 0.5]}, "lr: .*log_uniform needs numbers above 0"),
        ({"uniform": [0.0, 0.5], "choice": [1]}, "lr: .*exactly one of choice, uniform, log_uniform, integer"),
        ({"loguniform": [0.1, 0.5]}, "did you mean 'log_uniform'"),
    ],
)
def test_a_range_is_one_range(load: Callable[..., config.Experiment], values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(space={"lr": values})


@pytest.mark.parametrize(
    ("space_", "message"),
    [
        ({"learning_rate": {"uniform": [0.1, 0.2]}}, "learning_rate is neither a field of a recipe nor args"),
        ({"lr": {"uniform": [-1.0, 0.1]}}, "lr: -1.0 for run vit: lr: Input should be greater than 0"),
        ({"warmup_epochs": {"uniform": [0.5, 2.5]}}, "warmup_epochs: 0.5"),
        ({"auto_augment": {"choice": [None, "4a"]}}, "auto_augment: '4a'"),
        ({"args.head": {"choice": ["even", "even+abs_odd"]}}, "args.head: .* for run vit"),
        ({"args.init_value": {"choice": [0.1]}}, "takes no argument 'init_value'; did you mean 'init_values'"),
        ({"loss": {"choice": ["ce", "bce"]}}, "label_smoothing"),
        ({"epochs": {"integer": [1, 9]}}, "epochs is the same for all trials"),
    ],
)
def test_what_a_recipe_or_a_model_refuses_is_refused_before_anything_starts(
    load: Callable[..., config.Experiment], space_: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        search_space.check_search_space(load(space=space_))


def test_a_grid_has_ends(load: Callable[..., config.Experiment]) -> None:
    with pytest.raises(ConfigError, match="a grid needs choices or integers"):
        search_space.check_search_space(load(searcher="grid", trials=None))
    with pytest.raises(ConfigError, match="null for grid"):
        load(searcher="grid")


def test_a_sweep_names_runs_with_recipes_of_their_own(load: Callable[..., config.Experiment]) -> None:
    with pytest.raises(ConfigError, match="no run named 'vitt'; did you mean 'vit'"):
        load(runs=["vitt"], own_space={})
    with pytest.raises(ConfigError, match="vit-tuned has a recipe from a sweep"):
        load(runs=["vit-tuned"], own_space={})


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_confirmation_that_can_find_nothing_is_refused(load: Callable[..., config.Experiment], seeds: int) -> None:
    with pytest.raises(ConfigError, match="confirm_seeds: .* give 0, or at least 3"):
        load(confirm_seeds=seeds)


@pytest.mark.parametrize("searcher", ["optuna", "random", "grid"])
def test_the_same_seed_and_space_suggest_the_same(searcher: str) -> None:
    of = {name: schema.Range(**values) for name, values in SPACE.items()}
    if searcher == "grid":
        of = {"warmup_epochs": schema.Range(integer=(0, 2)), "lr": schema.Range(choice=(1e-3, 2e-3))}

    def points(seed: int, rounds: tuple[int, ...] = (2, 2, 2)) -> list:
        suggested, seen = search_space.PointSampler(of, searcher, seed), []
        for count in rounds:
            asked = suggested.ask(count)
            suggested.tell([None if number else 50.0 + 1e3 * point["lr"] for number, point in enumerate(asked)])
            seen += asked
        return seen

    assert points(0) == points(0) and len(points(0)) == 6
    if searcher == "grid":
        assert len({tuple(point.items()) for point in points(0)}) == 6 and len(points(0, (4, 4))) == 6
    else:
        assert points(0) != points(1)


def test_importance_finds_the_field_that_matters() -> None:
    of = {name: schema.Range(**values) for name, values in SPACE.items()}
    reached = [(point, 100 * point["lr"]) for point in search_space.PointSampler(of, "random", 0).ask(24)]
    found = search_space.param_importances(of, reached)
    assert next(iter(found)) == "lr" and sum(found.values()) == pytest.approx(1)
    assert search_space.param_importances(of, reached[:1]) == {}


def test_early_stopping_keeps_one_in_so_many() -> None:
    from pipeline.sweeps import engine

    asha = schema.AshaParams(grace_epochs=2, reduction_factor=3)
    assert list(engine.rungs(asha, 18)) == [2, 6]
    assert engine.survives_rung(1.0, [9.0, 9.0], 3)  # too few to compare with
    assert engine.survives_rung(9.0, [1.0, 5.0, 9.0], 3) and not engine.survives_rung(4.0, [1.0, 5.0, 9.0], 3)


def test_an_override_makes_a_recipe_and_changes_the_models_arguments(
    tmp_path: Path, load: Callable[..., config.Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="sweeps/recipe/e-vit/best.yaml, which does not exist"):
        load().recipe("e-vit-tuned")
    best = tmp_path / "sweeps/recipe/e-vit/best.yaml"
    best.parent.mkdir(parents=True)
    best.write_text("recipe: {lr: 0.004}\nargs: {head: even+abs_odd}\n")
    experiment = load()
    assert experiment.recipe("e-vit-tuned") == experiment.recipe("e-vit").model_copy(update={"lr": 0.004})
    assert experiment.run("e-vit-tuned").args == {**experiment.run("e-vit").args, "head": "even+abs_odd"}
    monkeypatch.chdir(tmp_path)
    resolve.run("e-vit-tuned")
    resolve.run("digits")
    written = read_yaml(Path("recipes/e-vit-tuned.yaml"))
    assert (written["recipe"]["lr"], written["args"]) == (0.004, {"head": "even+abs_odd"})
    before = Path("recipes/digits.yaml").read_text()
    best.write_text("recipe: {lr: 0.005}\n")
    resolve.run("digits")
    assert Path("recipes/digits.yaml").read_text() == before
    best.write_text("recipe: {lr: 0.0}\n")
    with pytest.raises(ConfigError, match="best.yaml: lr: Input should be greater than 0"):
        load()
    best.write_text("recipes: {lr: 0.1}\n")
    with pytest.raises(ConfigError, match="recipes: unknown parameter; did you mean 'recipe'"):
        load()


def test_a_truncated_history_file_is_readable(tmp_path: Path) -> None:
    from pipeline.sweeps.trial import TrialDirectory

    folder = TrialDirectory(tmp_path)
    assert folder.load_history() == []
    for epoch in (0, 1):
        folder.append_epoch({"epoch": epoch, "val/top1_pct": 50.0})
    with folder.history_file.open("a") as file:
        file.write('{"epoch": 2, "val/to')
    assert [row["epoch"] for row in folder.load_history()] == [0, 1]
    folder.append_epoch({"epoch": 2, "val/top1_pct": 60.0})
    assert [row["epoch"] for row in folder.load_history()] == [0, 1, 2]


def test_sigterm_ends_a_sweep_as_ctrl_c_does() -> None:
    from pipeline.sweeps import engine

    with pytest.raises(KeyboardInterrupt), engine._sigterm_as_sigint():
        signal.raise_signal(signal.SIGTERM)
