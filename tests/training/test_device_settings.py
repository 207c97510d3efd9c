"""Switches of how a network is computed leave what it computes alone."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import use_fused_attn
from torch import nn

from pipeline.base import config, schema
from pipeline.base.config import load_experiment
from pipeline.base.errors import ConfigError
from pipeline.base.schema import Recipe
from pipeline.training import device_settings
from pipeline.training import recipe as recipes

EXPERIMENT = config.load_experiment("params.yaml")

RUNS = [name for name, run in EXPERIMENT.models.items() if run.recipe not in EXPERIMENT.sweeps.tuned]


def settings(**changes: bool) -> schema.Train:
    off = {"tf32": False, "fused_attention": True, "channels_last": False, "activation_checkpointing": False}
    return EXPERIMENT.train.model_copy(update=off | changes)


@pytest.fixture(autouse=True)
def _restored():
    yield
    device_settings.apply_backend_settings(EXPERIMENT.train.model_copy(update={"tf32": False}))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=generator)
    model.double().train()(images).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("switch", ["fused_attention", "channels_last", "activation_checkpointing"])
def test_settings_leave_gradients_unchanged(name, switch):
    found = []
    for on in (False, True):
        device_settings.apply_backend_settings(settings(**{switch: on}))
        model = recipes.build_model(EXPERIMENT.run(name), EXPERIMENT.recipe(name), num_classes=10, seed=0)
        found.append(gradients(device_settings.apply_model_settings(model, settings(**{switch: on}))))
    for off, on in zip(*found, strict=True):
        torch.testing.assert_close(on, off, rtol=1e-9, atol=1e-12)


def test_settings_reach_torch_and_timm():
    device_settings.apply_backend_settings(settings(tf32=True, fused_attention=False))
    assert torch.get_float32_matmul_precision() == "high" and not use_fused_attn()
    device_settings.apply_backend_settings(settings(tf32=False, fused_attention=True))
    assert torch.get_float32_matmul_precision() == "highest" and use_fused_attn()
    model = recipes.build_model(EXPERIMENT.run("convnext"), EXPERIMENT.recipe("convnext"), num_classes=10, seed=0)
    patches = model.get_parameter("stem.weight")
    assert not patches.is_contiguous(memory_format=torch.channels_last)
    device_settings.apply_model_settings(model, settings(channels_last=True))
    assert model.get_parameter("stem.weight").is_contiguous(memory_format=torch.channels_last)
    vit = recipes.build_model(EXPERIMENT.run("vit"), EXPERIMENT.recipe("vit"), num_classes=10, seed=0)
    assert device_settings.apply_model_settings(
        copy.deepcopy(vit), settings(activation_checkpointing=True)
    ).grad_checkpointing
    assert not device_settings.apply_model_settings(vit, settings()).grad_checkpointing


def test_a_model_that_cannot_recompute_is_refused():
    with pytest.raises(ConfigError, match="activation_checkpointing: Linear does not support it"):
        device_settings.apply_model_settings(nn.Linear(2, 2), settings(activation_checkpointing=True))


class Small(nn.Module):
    """Has memory for `room` images."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.seen = room, []
        self.norm, self.head = nn.LayerNorm(3 * 4 * 4), nn.Linear(3 * 4 * 4, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("no room")
        return self.head(self.norm(images.flatten(1)))


@pytest.fixture
def recipe(root) -> Recipe:
    return load_experiment(root / "params.yaml").recipes["digits"]


def largest(model: Small, recipe: Recipe, sizes: list[int]) -> int:
    return device_settings.find_max_batch_size(model, recipe, sizes, image_size=4, num_classes=5, amp=None)


@pytest.mark.parametrize(
    ("share", "group", "sizes"),
    [
        (1024, 128, [1024, 512, 256, 128]),
        (128, 128, [128]),
        (96, 16, [96, 64, 32, 16]),
        (688, 16, [688, 512, 256, 128, 64, 32, 16]),
    ],
)
def test_sizes_are_whole_groups_from_the_whole_share_down(share, group, sizes):
    assert device_settings.candidate_batch_sizes(share, group) == sizes
    assert all(size % group == 0 for size in sizes)


@pytest.mark.parametrize(("room", "found"), [(1000, 64), (64, 64), (63, 32), (33, 32), (16, 16)])
def test_the_largest_size_that_fits_is_found_and_nothing_smaller_tried(recipe, room, found):
    model = Small(room)
    assert largest(model, recipe, [64, 32, 16]) == found
    assert model.seen == [size for size in (64, 32, 16) if size >= found]


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_finding_a_batch_size_changes_no_weight_and_leaves_no_gradient(recipe, optimizer):
    model = Small(32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    largest(model, recipe.model_copy(update={"optimizer": optimizer}), [64, 32])
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_group_that_does_not_fit_is_an_error_that_says_what_to_change(recipe):
    with pytest.raises(ConfigError, match="a batch of 16 images does not fit .* smaller mixup_group"):
        largest(Small(15), recipe, [64, 32, 16])
