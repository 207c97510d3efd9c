"""FLOP counts of single operations and of all rows of Table 1."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flopeq  # noqa: F401  registers our models
from flopeq.measure.flops import Complexity, complexity, count_operations
from flopeq.measure.paper import table1
from flopeq.models.build import build

AUTHORS = json.loads(Path(__file__).with_name("authors_flops.json").read_text())["models"]

FROZEN_ZEROS = {"flop_convnext_iso_base": "43.5", "flop_convnext_iso_large": "153.0"}
"""Rows for which the paper counts frozen zeros that are not parameters here."""

SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2}


@pytest.mark.parametrize("row", table1(), ids=lambda row: row.model)
def test_counts_match_table_1_to_the_printed_digit_and_the_authors_counter(row, caplog):
    counted = complexity(build(row.model, device="meta"), (3, 224, 224))
    assert f"{counted.params / 1e6:.1f}" == FROZEN_ZEROS.get(row.model, f"{row.params_m:.1f}")
    assert f"{counted.flops / 1e9:.1f}" == f"{row.gflops_per_img:.1f}"
    assert counted.flops == pytest.approx(AUTHORS[row.model]["flops_batch_64"], rel=0.005)
    assert counted.flops == counted.macs + counted.elementwise
    assert not caplog.records  # every operation has a stated cost


class Call(nn.Module):
    """A model that applies a function to the image."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.function(image)


def count(function, device: str = "meta") -> Complexity:
    """The operations of a function on an image of 3*4*4 = 48 numbers."""
    return complexity(Call(function).to(device), (3, 4, 4))


@pytest.mark.parametrize(
    "function, elementwise",
    [
        (lambda x: x + 1, 48),
        (lambda x: x * x, 48),
        (lambda x: x - x / 2, 96),
        (lambda x: -x, 48),
        (lambda x: torch.addcmul(x, x, x), 96),
        (lambda x: x.mean(dim=1), 48),
        (lambda x: x.var(dim=1, correction=0), 96),
        (lambda x: torch.var_mean(x, dim=1, correction=0), 144),
        (lambda x: x.softmax(dim=-1), 5 * 48),
        (lambda x: x.pow(2), 5 * 48),
        (lambda x: F.gelu(x), 8 * 48),
        (lambda x: x.sigmoid(), 4 * 48),
        (lambda x: x.sqrt(), 4 * 48),
        (lambda x: F.layer_norm(x, (4,), torch.ones(4, device=x.device)), 5 * 48),
        (lambda x: x.flip(-1), 0),
        (lambda x: torch.cat((x, x)), 0),
        (lambda x: x.transpose(1, 2).reshape(1, -1), 0),
    ],
)
def test_element_wise_operations_cost_as_in_the_convention(function, elementwise, caplog):
    assert count(function) == Complexity(params=0, flops=elementwise, macs=0, elementwise=elementwise)
    assert not caplog.records


@pytest.mark.parametrize(
    "function, macs",
    [
        (lambda x: F.linear(x, torch.ones(5, 4, device=x.device), torch.ones(5, device=x.device)), 48 * 5),
        (lambda x: x @ x, 48 * 4),
        (lambda x: torch.baddbmm(x[0], x[0], x[0]), 48 * 4),
        (lambda x: torch.einsum("bchw,dc->bdhw", x, torch.ones(5, 3, device=x.device)), 48 * 5),
        (lambda x: F.conv2d(x, torch.ones(6, 3, 2, 2, device=x.device)), 9 * 6 * 12),
        (lambda x: F.conv2d(x, torch.ones(3, 1, 3, 3, device=x.device), padding=1, groups=3), 16 * 3 * 9),
        (lambda x: F.conv2d(x, torch.ones(6, 3, 3, 3, device=x.device), padding="same"), 16 * 6 * 27),
        (lambda x: F.conv_transpose2d(x, torch.ones(3, 6, 2, 2, device=x.device), stride=2), 16 * 6 * 12),
    ],
)
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_linear_operation_costs_its_multiply_adds_on_every_device(function, macs, device, caplog):
    assert count(function, device) == Complexity(params=0, flops=macs, macs=macs, elementwise=0)
    assert not caplog.records


@pytest.mark.parametrize("model", ["deit3_small_patch16_224", "flop_deit3_small_patch16_224"])
def test_fused_attention_costs_as_much_as_unfused(model, monkeypatch):
    fused = build(model, device="meta", **SMALL_VIT)
    unfused = build(model, device="meta", **SMALL_VIT)
    for block in fused.blocks:
        block.attn.fused_attn = True
    for block in unfused.blocks:
        block.attn.fused_attn = False
    assert complexity(fused, (3, 32, 32)) == complexity(unfused, (3, 32, 32))
    kinds, _ = count_operations(fused, torch.zeros(1, 3, 32, 32, device="meta"))
    assert kinds["attention_products"] == 3 * 2 * 17 * 17 * 64


def test_an_attention_mask_is_an_addition():
    def attend(x, mask):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    plain = count(lambda x: attend(x, None))
    masked = count(lambda x: attend(x, torch.zeros(4, 4, device=x.device)))
    assert masked.elementwise - plain.elementwise == 3 * 4 * 4
    assert masked.macs == plain.macs == 2 * 3 * 4 * 4 * 4


def test_the_addcmul_of_timms_resmlp_is_counted():
    model = build("resmlp_12_224", device="meta")
    kinds, unknown = count_operations(model, torch.zeros(1, 3, 224, 224, device="meta"))
    assert kinds["addcmul"] == 2 * (2 * 12 + 1) * 196 * 384
    assert not unknown


def test_an_operation_without_a_stated_cost_is_counted_and_named(caplog):
    assert count(torch.erfinv).elementwise == 48
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "aten::erfinv" in record.getMessage()


def test_counts_are_the_same_on_the_meta_device():
    weights = complexity(build("flop_deit3_small_patch16_224", **SMALL_VIT), (3, 32, 32))
    assert weights == complexity(build("flop_deit3_small_patch16_224", device="meta", **SMALL_VIT), (3, 32, 32))


def test_counting_does_not_change_the_mode_of_the_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout())
    model[1].eval()
    complexity(model, (3, 4, 4))
    assert model.training and model[2].training and not model[1].training
    assert model[1].num_batches_tracked == 0


def test_any_timm_model_can_be_counted(caplog):
    counted = complexity(build("resnet18", device="meta"), (3, 224, 224))
    assert round(counted.macs / 1e9, 2) == 1.81  # as its authors print
    assert not caplog.records
