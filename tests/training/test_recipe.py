"""Optimizer, schedule, loss and moving average do what params.yaml says of them."""

from __future__ import annotations

import math

import pytest
import torch
from timm.layers import DropPath

from pipeline.base.config import load_experiment
from pipeline.base.errors import ConfigError
from pipeline.base.schema import Recipe, Run
from pipeline.training import recipe as recipes


@pytest.fixture
def recipe() -> Recipe:
    return load_experiment().recipes["digits"]


def rates(recipe: Recipe, steps_per_epoch: int) -> list[float]:
    """The learning rate of every step, as the loop sets it."""
    optimizer = recipes.build_optimizer(recipe, torch.nn.Linear(4, 4))
    schedule = recipes.build_scheduler(recipe, optimizer, steps_per_epoch)
    found = []
    for step in range(recipe.epochs * steps_per_epoch):
        schedule.step(step // steps_per_epoch)
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


IMAGENET = load_experiment("presets/imagenet.yaml").recipes


def test_vit_learning_rates_are_those_of_the_paper_at_given_epochs():
    by_epoch = rates(IMAGENET["vit-s"], steps_per_epoch=2)[::2]
    assert by_epoch[0] == 1e-6  # warm-up over 5 epochs: a straight line to 3e-3
    assert by_epoch[1:5] == pytest.approx([1e-6 + (3e-3 - 1e-6) * epoch / 5 for epoch in (1, 2, 3, 4)])
    for epoch in (5, 100, 200, 399):  # then a cosine over 400 epochs, as if it had started with the warm-up
        assert by_epoch[epoch] == pytest.approx(1e-5 + (3e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / 400)) / 2)


def test_convnext_learning_rates_are_those_of_the_paper_at_given_steps():
    steps_per_epoch = 4
    found, total = rates(IMAGENET["convnext-s"], steps_per_epoch), 300 * steps_per_epoch
    assert found[0] == 0
    assert found[100] == pytest.approx(4e-3 / 2)  # half of 50 epochs of warm-up
    for step in (200, 600, total - 1):
        expected = 1e-6 + (4e-3 - 1e-6) * (1 + math.cos(math.pi * step / total)) / 2
        assert found[step] == pytest.approx(expected)


def test_the_warm_up_starts_at_warmup_lr_and_the_decay_ends_near_min_lr(recipe):
    found = rates(recipe, steps_per_epoch=10)
    assert found[0] == pytest.approx(recipe.warmup_lr)
    assert max(found) <= recipe.lr
    assert max(found) == pytest.approx(recipe.lr, rel=0.02)
    assert found[-1] == pytest.approx(recipe.min_lr, rel=0.02)


def test_a_schedule_by_epoch_is_constant_within_each_epoch(recipe):
    found = rates(recipe.model_copy(update={"schedule_step": "epoch"}), steps_per_epoch=5)
    by_epoch = [set(found[start : start + 5]) for start in range(0, len(found), 5)]
    assert all(len(rate) == 1 for rate in by_epoch)
    assert len(set.union(*by_epoch)) > recipe.epochs // 2


def test_the_cooldown_lies_inside_the_epochs_and_stays_at_min_lr(recipe):
    found = rates(recipe.model_copy(update={"cooldown_epochs": 10}), steps_per_epoch=3)
    assert len(found) == recipe.epochs * 3
    assert set(found[-30:]) == {recipe.min_lr}
    assert found[-31] > recipe.min_lr


def test_biases_and_norms_have_no_weight_decay(recipe):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    decays = {
        id(parameter): group["weight_decay"]
        for group in recipes.build_optimizer(recipe, model).param_groups
        for parameter in group["params"]
    }
    assert decays.pop(id(model[0].weight)) == recipe.weight_decay
    assert set(decays.values()) == {0.0}


def test_lamb_does_not_clip_on_its_own_account(recipe):
    optimizer = recipes.build_optimizer(recipe.model_copy(update={"optimizer": "lamb"}), torch.nn.Linear(2, 2))
    assert optimizer.defaults["max_grad_norm"] is None


def test_binary_loss_counts_every_mixed_class_as_one(recipe):
    recipe = recipe.model_copy(update={"loss": "bce", "label_smoothing": 0.0})
    logits, mixed = torch.randn(2, 3), torch.tensor([[0.3, 0.7, 0.0], [1.0, 0.0, 0.0]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, (mixed > 0).float())
    torch.testing.assert_close(recipes.build_loss(recipe)(logits, mixed), expected)


def test_binary_loss_refuses_smoothed_labels_which_would_all_count_as_one(recipe):
    with pytest.raises(ConfigError, match="label_smoothing"):
        recipes.build_loss(recipe.model_copy(update={"loss": "bce"}))


def test_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone(recipe):
    run = Run(
        model="deit3_small_patch16_224",
        recipe="digits",
        args={"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
    )
    before = torch.get_rng_state()
    first, again, other = (
        recipes.build_model(run, recipe, num_classes=10, seed=seed).state_dict()["patch_embed.proj.weight"]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


RUNS = load_experiment().models


@pytest.mark.parametrize("name", RUNS)
def test_stochastic_depth_follows_the_recipes_rule_in_every_family(recipe, name):
    def rates(rule: str) -> list[float]:
        dropping = recipe.model_copy(update={"drop_path": 0.3, "drop_path_rule": rule})
        built = recipes.build_model(RUNS[name], dropping, num_classes=10, seed=0, device="meta")
        return [module.drop_prob for module in built.modules() if isinstance(module, DropPath)]

    branches = 2 if "vit" in name else 1  # places a block; ResMLP and ConvNeXt have one module for all of a block's
    assert rates("constant") == [0.3] * 3 * branches
    assert rates("linear") == pytest.approx([rate for rate in (0.0, 0.15, 0.3) for _ in range(branches)])


def test_stochastic_depth_without_a_place_for_it_is_refused(recipe):
    dropping = recipe.model_copy(update={"drop_path": 0.1})
    with pytest.raises(ConfigError, match="ResNet has no blocks to drop"):
        recipes.build_model(Run(model="resnet18", recipe="digits"), dropping, num_classes=10, seed=0, device="meta")


def test_the_moving_average_follows_with_the_decay(recipe):
    model = torch.nn.Linear(2, 2)
    ema = recipes.build_ema(recipe.model_copy(update={"ema_decay": 0.9}), model)
    assert ema is not None and recipes.build_ema(recipe, model) is None
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    ema.update(model, step=5)
    torch.testing.assert_close(ema.module.weight, start + 0.1)
