"""Switches of how a network is computed leave what it computes alone."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import use_fused_attn
from torch import nn

from pipeline.base import config, schema
from pipeline.base.errors import ConfigError
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
