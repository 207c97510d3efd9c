"""One E and one H of every family, small, for the tools that users put around a model."""

from __future__ import annotations

import pytest
from torch import nn

from tests.models.conftest import FAMILIES, small_model

NAMES = [prefix + baseline for baseline in FAMILIES.values() for prefix in ("flop_", "flophybrid_")]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str) -> nn.Module:
    """A small model in float64 and evaluation mode, with random parameters."""
    return small_model(name)


def unfuse_attention(model: nn.Module) -> nn.Module:
    """Makes attention use ordinary products, because torch's fused kernels know no forward-mode derivative."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that tools find by their exact type."""
    return {key: module for key, module in model.named_modules() if type(module) is nn.Linear}
