"""Networks with `octic_vits` keep timm's contract. tests/hub/test_convert_octic.py compares them with octic-vits."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.fx import symbolic_trace
from torchvision.models.feature_extraction import create_feature_extractor

from flopeq.models.octic_vits import ConcatenatedIrreps

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 5}

both = pytest.mark.parametrize("octic_vits", ["hybrid", "invariant"])


def network(octic_vits: str, **args: Any) -> nn.Module:
    return timm.create_model("octichybrid_deit3_large_patch16_224", octic_vits=octic_vits, **SIZE, **args)


@both
def test_the_network_is_traced_and_exported(octic_vits: str) -> None:
    model, x = network(octic_vits).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = model(x)
        assert torch.equal(torch.export.export(model, (x,)).module()(x), logits)
        extractor = create_feature_extractor(model, ["head"])
        torch.testing.assert_close(extractor(x)["head"], logits)
    assert symbolic_trace(model.get_submodule("blocks.1.split"))


@both
def test_gradients_are_finite_and_checkpointing_changes_none(octic_vits: str) -> None:
    model, x = network(octic_vits).double(), torch.randn(2, 3, 32, 32).double()
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_signs_are_written_again_after_the_meta_device() -> None:
    with torch.device("meta"):
        model = network("hybrid")
    model.to_empty(device="cpu").init_weights("reset")
    expected = torch.ones(8, 4)
    expected[[5, 7]] = -1
    assert torch.equal(model.get_buffer("blocks.1.split.signs"), expected.flatten())


def test_irreps_are_concatenated_in_the_order_of_octic_vits() -> None:
    # a1, a2, b1, b2, then e: its first row with both halves of the channels, and its second row.
    x = torch.arange(16.0)
    first_row, second_row = x[8:12], x[12:16]
    expected = torch.cat([x[:8], first_row[:2], -second_row[:2], first_row[2:], -second_row[2:]])
    assert torch.equal(ConcatenatedIrreps(16)(x), expected)
