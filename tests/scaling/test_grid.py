"""The trainings of the scaling study: what they cost, which are left out, and what is refused before they start."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flopeq.measure.flops import Complexity
from pipeline.base import config
from pipeline.base.errors import ConfigError
from pipeline.base.yaml_files import dump_yaml, read_yaml
from pipeline.scaling import estimate, grid

ROOT = Path(__file__).resolve().parents[2]

NUM_IMAGES = 1437

Load = Callable[..., config.Experiment]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """The committed experiment with other settings of its scaling study."""
    params = read_yaml(ROOT / "params.yaml")

    def load(**changes: Any) -> config.Experiment:
        changed = copy.deepcopy(params)
        changed["scaling"].update(changes)
        (tmp_path / "params.yaml").write_text(dump_yaml(changed))
        return config.load_experiment(tmp_path / "params.yaml")

    return load


def costs(experiment: config.Experiment, flops: int = 800_000) -> grid.Costs:
    """Every size costs twice as much as the one before it, and E half of X."""
    settings = grid.scaling_of(experiment)
    return {
        (arm, size): Complexity(number, flops * 2**number // (2 if arm == "e" else 1), 0, 0)
        for arm in settings.arms
        for number, size in enumerate(settings.sizes)
    }


def test_a_training_spends_its_budget_to_within_a_step(load):
    experiment = load(unique_images=None)
    plan = grid.plan_study(experiment, costs(experiment), NUM_IMAGES)
    assert len(plan.trainings) == 27 and not plan.left_out
    for training in plan.trainings:
        assert training.compute <= training.budget < training.compute + 3 * training.flops_image * 64
        assert training.images_seen == 64 * training.steps == pytest.approx(training.epochs * NUM_IMAGES)
    x, e = (next(t for t in plan.trainings if t.name == f"{arm}-w32-2.5e+10-seed0") for arm in ("x", "e"))
    assert (x.steps, e.steps) == (162, 325)


def test_the_data_study_sees_as_many_images_more_often(load):
    experiment = load(unique_images={"fractions": [0.1, 1.0, 0.25], "size": "w48", "budget": 2.5e10}, seeds=2)
    plan = grid.plan_study(experiment, costs(experiment), NUM_IMAGES)
    data = [training for training in plan.trainings if training.study == "data"]
    assert [(t.arm, t.seed, t.unique_images) for t in data[:4]] == [
        ("x", 0, 359), ("x", 1, 359), ("x", 0, 144), ("x", 1, 144)
    ]  # fmt: skip
    assert len(data) == 12 and len(plan.trainings) == 54 + 12  # all images: a training of the study of compute
    whole = next(t for t in plan.trainings if t.name == "x-w48-2.5e+10-seed0")
    assert {t.images_seen for t in data if t.arm == "x"} == {whole.images_seen}
    assert data[0].epochs == pytest.approx(whole.images_seen / 359)


def test_a_larger_grid_keeps_the_names_of_its_trainings(load):
    small, large = load(), load(budgets=[1.0e10, 1.5e10, 2.5e10, 4.0e10], seeds=2)
    names = [[t.name for t in grid.plan_study(e, costs(e), NUM_IMAGES).trainings] for e in (small, large)]
    assert set(names[0]) < set(names[1]) and len(set(names[1])) == len(names[1])


def test_sizes_that_are_too_large_or_too_small_for_a_budget_are_left_out(load):
    experiment = load(max_epochs=100, unique_images=None, budgets=[1.0e10, 6.0e11])
    plan = grid.plan_study(experiment, costs(experiment), NUM_IMAGES)
    assert plan.left_out == [
        "x at 1e+10 FLOPs: w64 would take 16 steps",
        "x at 6e+11 FLOPs: w32 would take 174 epochs",
        "x-flop at 1e+10 FLOPs: w64 would take 16 steps",
        "x-flop at 6e+11 FLOPs: w32 would take 174 epochs",
        "e at 6e+11 FLOPs: w32 would take 348 epochs",
        "e at 6e+11 FLOPs: w48 would take 174 epochs",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": [1e9]}, r"no size of x can spend 1e\+09 FLOPs: w32 would take 6 steps, .*at least 20 steps"),
        ({"budgets": [1e14]}, r"no size of x can spend 1e\+14 FLOPs: .* epochs, .*at most 100 epochs"),
        ({"unique_images": {"fractions": [0.01], "size": "w32", "budget": 1e10}}, "are 14, fewer than a batch of 64"),
        ({"unique_images": {"fractions": [0.5], "size": "w64", "budget": 1e10}}, "16 steps of x in size w64"),
    ],
)
def test_what_no_training_can_spend_is_refused(load, changes, message):
    experiment = load(**changes)
    with pytest.raises(ConfigError, match=message):
        grid.plan_study(experiment, costs(experiment), NUM_IMAGES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "X"}, r"scaling.baseline: no arm named 'X'; known: x, x-flop, e"),
        ({"equivariant": "f"}, "scaling.equivariant: no arm named 'f'"),
        ({"recipe": "digit"}, "scaling.recipe: no recipe .* named 'digit'; did you mean 'digits'"),
        ({"unique_images": {"fractions": [0.5], "size": "w31", "budget": 1e10}}, "unique_images.size: .*'w32'"),
        ({"arms": {"x": {"model": "deit3_small_patch16_224", "recipe": {"lrr": 1}}}}, "arms.x.recipe: lrr: unknown"),
        ({"arms": {"x": {"model": "deit3_small_patch16_224", "recipe": {"epochs": 1}}}}, "epochs: a budget sets it"),
        ({"seed": 2}, "scaling.seed: unknown parameter; did you mean 'seeds'"),
    ],
)
def test_unknown_names_are_refused(load, changes, message):
    with pytest.raises(ConfigError, match=message):
        load(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": {"w": {"embed_dim": 50, "num_heads": 4}}}, "arm x in size w: .*"),
        ({"sizes": {"w": {"embed_dim": 32, "num_heads": 2, "depht": 2}}}, "did you mean 'depth'"),
        ({"args": {"img_size": 48, "patch_size": 8, "depth": 1}}, "arm x in size w32"),
    ],
)
def test_networks_that_cannot_be_built_are_refused(load, changes, message):
    with pytest.raises(ConfigError, match=message):
        grid.check_study(load(unique_images=None, **changes))


def test_arms_cost_what_their_networks_cost(load):
    experiment = load(sizes={"w32": {"embed_dim": 32, "num_heads": 1}}, unique_images=None)
    counted = grid.count_costs(experiment, 10)
    assert counted["x", "w32"] == counted["x-flop", "w32"]
    assert counted["x", "w32"].flops == 865_071 and counted["e", "w32"].flops == 592_305


@pytest.mark.slow
def test_the_full_study_takes_about_3000_a100_hours():
    experiment = config.load_experiment(ROOT / "presets/imagenet.yaml")
    found = estimate.estimate_study(experiment)
    assert 2500 < found.a100_hours < 3500 and found.hours is None
