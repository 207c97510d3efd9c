"""The recipe search without trainings: what is confirmed, what is handed on, and that it resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.base import config
from pipeline.base.yaml_files import dump_yaml, read_yaml
from pipeline.sweeps import analysis, engine, recipe_sweep
from pipeline.sweeps.recipe_search import RecipeSearch
from pipeline.sweeps.sweep import Sweep
from pipeline.sweeps.trial import State, TrialDirectory, TrialOutcome, TrialSpec
from pipeline.training import fingerprint
from stages import resolve

ROOT = Path(__file__).resolve().parents[2]

Train = Callable[[TrialSpec], tuple[State, float]]


@pytest.fixture
def make_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RecipeSearch]:
    """The search of the committed experiment for `vit`, over `lr` and an argument of the model, without data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        fingerprint,
        "compute_fingerprint",
        lambda content, shards: hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
    )

    def make(**changes: Any) -> RecipeSearch:
        params = read_yaml(ROOT / "params.yaml")
        params["sweeps"]["recipe"] |= {
            "runs": ["vit"],
            "space": {"lr": {"log_uniform": [2.1e-3, 8e-3]}, "args.init_values": {"uniform": [0.2, 1.0]}},
            "own_space": {},
            "trials": 6,
            "round": 3,
            "asha": None,
            **changes,
        }
        Path("params.yaml").write_text(dump_yaml(params))
        sweep = object.__new__(Sweep)
        sweep.experiment = config.load_experiment()
        sweep.settings, sweep.classes = sweep.experiment.sweeps.recipe, None
        sweep.images, sweep.shards = {"train": range(640), "val": range(64)}, SimpleNamespace()  # pyright: ignore
        return RecipeSearch(sweep, "vit")

    return make


def lr_of(spec: TrialSpec) -> float:
    return spec.experiment.recipe("vit").lr


def is_own(spec: TrialSpec) -> bool:
    return lr_of(spec) == 2e-3


def higher_lr_wins(spec: TrialSpec) -> tuple[State, float]:
    """A better recipe has a higher lr, at any length."""
    return "finished", 50.0 + 1e3 * lr_of(spec) + 0.01 * spec.seed + 0.5 * spec.epochs


def run_plan(search: RecipeSearch, train: Train) -> list[TrialOutcome]:
    """Runs the plan with made-up results. Returns all outcomes."""
    plan, done = search.plan_trials(), []
    specs = next(plan)
    while True:
        outcomes = []
        for spec in specs:
            state, top1 = train(spec)
            outcomes.append(TrialOutcome(spec, state, ({"val/top1_pct": top1},), 1.0))
        done += outcomes
        try:
            specs = plan.send(outcomes)
        except StopIteration:
            return done


def tuned(search: RecipeSearch) -> tuple[config.Experiment, Mapping[str, Any], str]:
    """Writes best.yaml. Returns the experiment with it, what the stage `tuned` writes, and the file's header."""
    recipe_sweep.write_best(Path("sweeps/recipe/vit"), search, search.summarize())
    resolve.run("vit-tuned")
    lines = Path("sweeps/recipe/vit/best.yaml").read_text().splitlines()
    header = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
    return config.load_experiment(), read_yaml(Path("recipes/vit-tuned.yaml")), header


def assert_keeps_its_own_recipe(search: RecipeSearch, reason: str) -> None:
    experiment, resolved, header = tuned(search)
    resolve.run("digits")
    assert experiment.recipe("vit-tuned") == experiment.recipe("vit")
    assert experiment.run("vit-tuned").args == experiment.run("vit").args
    assert resolved == {"recipe": read_yaml(Path("recipes/digits.yaml"))["recipe"], "args": {}}
    assert "the run keeps its own recipe" in header and reason in header


def test_a_recipe_that_is_better_at_full_length_is_handed_on(make_search: Callable[..., RecipeSearch]) -> None:
    search = make_search()
    outcomes = run_plan(search, higher_lr_wins)
    best = max((o.spec for o in outcomes if not o.spec.is_confirmation), key=lr_of)
    experiment, resolved, header = tuned(search)
    assert (experiment.recipe("vit-tuned").lr, resolved["recipe"]["lr"]) == (lr_of(best), lr_of(best))
    assert resolved["args"] == {"init_values": best.params["args.init_values"]}
    assert experiment.run("vit-tuned").args == experiment.run("vit").args | resolved["args"]
    assert "with 3 new seeds and all 50 epochs" in header and "it replaces the run's own" in header

    confirmation = [o.spec for o in outcomes if o.spec.is_confirmation]
    assert {(spec.epochs, spec.experiment.recipe("vit").warmup_epochs) for spec in confirmation} == {(50, 5)}
    assert [spec.seed for spec in confirmation] == [1, 1, 2, 2, 3, 3]
    assert {o.spec.seed for o in outcomes if not o.spec.is_confirmation} == {0}
    assert len(outcomes) == search.max_search_trials + search.max_confirmation_trials == 12


def test_a_recipe_that_is_better_only_in_the_search_is_not_handed_on(make_search: Callable[..., RecipeSearch]) -> None:
    search = make_search()

    def train(spec: TrialSpec) -> tuple[State, float]:
        return "finished", 50.0 + (-1e3 if spec.is_confirmation else 1e3) * lr_of(spec)

    outcomes = run_plan(search, train)
    assert len(outcomes) == 6 + 2  # the first new seed decides
    assert_keeps_its_own_recipe(search, "with 1 new seed and all 50 epochs")


def test_one_seed_within_the_others_spread_is_no_gain(make_search: Callable[..., RecipeSearch]) -> None:
    search = make_search()

    def train(spec: TrialSpec) -> tuple[State, float]:
        state, top1 = higher_lr_wins(spec)
        return state, 99.0 if spec.is_confirmation and is_own(spec) and spec.seed == 3 else top1

    assert len(run_plan(search, train)) == 12
    assert_keeps_its_own_recipe(search, "not shown to be better")


def test_nothing_above_the_own_recipe_in_the_search(make_search: Callable[..., RecipeSearch]) -> None:
    search = make_search(rank_configs=4)
    outcomes = run_plan(search, lambda spec: ("finished", 50.0 - 1e3 * lr_of(spec)))
    assert len(outcomes) == 6 + 4  # the rank correlation needs one seed
    assert_keeps_its_own_recipe(search, "nothing is above its own recipe")
    assert search.summarize()["ranking"]["coefficient"] == pytest.approx(1.0)


def test_no_confirmation_hands_nothing_on(make_search: Callable[..., RecipeSearch]) -> None:
    search = make_search(confirm_seeds=0)
    assert len(run_plan(search, higher_lr_wins)) == 6 == search.max_search_trials + search.max_confirmation_trials
    assert_keeps_its_own_recipe(search, "not confirmed")


@pytest.mark.parametrize(
    ("side", "state", "is_handed_on"),
    [("own", "failed", False), ("best", "failed", False), ("best", "diverged", False), ("own", "diverged", True)],
)
def test_a_confirmation_with_a_trial_that_ended_early(
    make_search: Callable[..., RecipeSearch], side: str, state: State, is_handed_on: bool
) -> None:
    """A failed trial says nothing about a recipe. One that diverged says that it does not train."""
    search = make_search()

    def train(spec: TrialSpec) -> tuple[State, float]:
        ended, top1 = higher_lr_wins(spec)
        return state if spec.is_confirmation and spec.seed == 2 and is_own(spec) == (side == "own") else ended, top1

    run_plan(search, train)
    assert search.is_confirmed is is_handed_on
    if is_handed_on:
        assert search.summarize()["confirmed"]["own"][1] == 0.0
    else:
        assert_keeps_its_own_recipe(search, "failed" if state == "failed" else "not shown to be better")


def test_further_configurations_serve_the_rank_correlation_only(make_search: Callable[..., RecipeSearch]) -> None:
    search = make_search(rank_configs=4)

    def train(spec: TrialSpec) -> tuple[State, float]:
        """The worst of the search is the best at full length."""
        ranked = sorted((c for c in search.configurations), key=lambda c: c.top1_pct or 0.0)
        others = [c.point["lr"] for c in ranked if c.point][:1]
        state, top1 = higher_lr_wins(spec)
        return state, 99.9 if spec.is_confirmation and lr_of(spec) in others else top1

    outcomes = run_plan(search, train)
    assert [o.spec.seed for o in outcomes if o.spec.is_confirmation] == [1, 1, 1, 1, 2, 2, 3, 3]
    best = search.best
    assert best is not None and search.final_point == best.point
    ranking = search.summarize()["ranking"]
    assert [row["is_own"] for row in ranking["configurations"]] == [True, False, False, False]
    searched = sorted(c.top1_pct or 0.0 for c in search.configurations)
    ranked = sorted(row["search_top1_pct"] for row in ranking["configurations"])
    assert ranked == [searched[0], searched[1], searched[3], searched[5]]  # own, worst, middle, best
    assert ranking["coefficient"] == pytest.approx(0.4)  # 1, 2, 3, 4 against 1, 4, 2, 3
    assert "does not show that the ranking carries over" in analysis.describe_recipe_finding(search.summarize())


class DriverKilled(Exception):
    """The driver ends here."""


def run_with_engine(search: RecipeSearch, trials_dir: Path, train: Train, *, max_trained: int = 1000) -> list[str]:
    """Runs the plan as Tune does, with trials that leave their files. Returns the trials that were trained."""
    reporter: Any = SimpleNamespace(on_trial_start=lambda spec: None, on_trial_complete=lambda outcome, metrics: None)
    searcher = engine.PlanSearcher({"vit": search.plan_trials()}, {}, reporter, trials_dir)
    trained = []
    for number in range(1000):
        suggestion = searcher.suggest(str(number))
        if not isinstance(suggestion, dict):
            assert suggestion == searcher.FINISHED
            return trained
        spec = suggestion["spec"]
        folder = TrialDirectory(trials_dir / spec.fingerprint)
        if not folder.load("outcome"):
            if len(trained) == max_trained:
                raise DriverKilled
            trained.append(spec.name)
            state, top1 = train(spec)
            folder.append_epoch({"epoch": 0, "val/top1_pct": top1, "perf/img_per_s": 100.0})
            folder.save("outcome", {"state": state})
        searcher.on_trial_complete(str(number), {})
    raise AssertionError("endless")


@pytest.mark.parametrize("trained_before", [4, 7, 8, 11])
def test_an_interrupted_confirmation_resumes_to_the_same_finding(
    make_search: Callable[..., RecipeSearch], tmp_path: Path, trained_before: int
) -> None:
    search = make_search()
    all_trials = run_with_engine(search, tmp_path / "reference", higher_lr_wins)
    expected = search.summarize()
    assert len(all_trials) == 12 and expected["is_confirmed"]
    with pytest.raises(DriverKilled):
        run_with_engine(make_search(), tmp_path / "trials", higher_lr_wins, max_trained=trained_before)
    resumed = make_search()
    assert run_with_engine(resumed, tmp_path / "trials", higher_lr_wins) == all_trials[trained_before:]
    assert resumed.summarize() == expected


def test_asha_never_stops_a_confirmation(make_search: Callable[..., RecipeSearch]) -> None:
    search = make_search(asha={"grace_epochs": 1, "reduction_factor": 2})
    plan = search.plan_trials()
    specs = next(plan)
    searcher: Any = SimpleNamespace(stopped=set(), get_trial=lambda name: by_name[name])
    scheduler = engine.RoundAshaScheduler(search.settings.asha, searcher)
    later = TrialSpec(**{**vars(specs[0]), "round": 1, "index": 9})
    by_name = {str(number): spec for number, spec in enumerate(specs)}
    by_name |= {"search": later, "confirmation": TrialSpec(**{**vars(later), "is_confirmation": True})}

    def decide(name: str, top1: float) -> str:
        return scheduler.on_trial_result(None, SimpleNamespace(trial_id=name), {"epoch": 0, "val/top1_pct": top1})

    assert [decide(str(number), 90.0) for number in range(len(specs))] == ["CONTINUE"] * 3
    assert (decide("search", 10.0), decide("confirmation", 10.0)) == ("STOP", "CONTINUE")
