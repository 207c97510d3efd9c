"""Isotropic ConvNeXts of groups beyond the flop. Their laws and timm's contract are in test_group_models.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flopeq.groups import C2, C2XC2, D4, TRIVIAL, Group
from flopeq.layers.group import GroupDepthwiseConv
from flopeq.models.convnext import FlopConvNeXtBlock
from flopeq.models.group_convnext import GroupConvNeXtBlock, GroupConvNeXtIso
from flopeq.square import FLOP
from flopeq.testing import assert_equivariant, block_errors
from tests.models.conftest import random_images, randomize_parameters, small_model

OCTIC, MIRRORS = "octic_convnext_iso_base", "mirrors_convnext_iso_base"


@pytest.mark.parametrize("group", [C2XC2, D4], ids=lambda group: group.name)
def test_a_block_adds_an_update_of_the_same_symmetry(group: Group) -> None:
    block = randomize_parameters(GroupConvNeXtBlock(group, 16, 0.5, 0.0).double())
    x_BCHW = torch.randn(2, 16, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = block(x_BCHW)
    for g in group.elements:
        torch.testing.assert_close(block(group.act_on_grid(g, x_BCHW)), group.act_on_grid(g, y))
    with torch.no_grad():
        block.gamma.zero_()
    torch.testing.assert_close(block(x_BCHW), x_BCHW)


def test_both_rows_of_the_two_dimensional_irrep_share_a_layer_scale() -> None:
    assert len(small_model(OCTIC, (24, 24)).blocks[0].gamma) == 12  # a1, a2, b1, b2 have 2 each, e has 4
    assert small_model(OCTIC, (24, 24), ls_init_value=None).blocks[0].gamma is None


def test_the_check_names_a_block_with_a_wrongly_transformed_kernel() -> None:
    model, x = small_model(OCTIC, (40, 40)), random_images((40, 40))
    assert_equivariant(model, x, group="d4")
    conv = model.blocks[1].conv_dw
    assert isinstance(conv, GroupDepthwiseConv)
    *first, last = conv.symmetries
    conv.symmetries = (*first, FLOP @ last)
    with pytest.raises(AssertionError, match=r"blocks\.1 is off"):
        assert_equivariant(model, x, group="d4")


def test_the_check_names_a_block_with_a_bias_on_features_that_change() -> None:
    model, x = small_model(MIRRORS), random_images()
    model.blocks[1].mlp.fc1.oo.register_forward_hook(lambda module, args, part: part + 1)
    with pytest.raises(AssertionError, match=r"blocks\.1 is off"):
        assert_equivariant(model, x, group="c2xc2")


def test_c2xc2_commutes_on_images_that_are_not_square() -> None:
    for image in ((16, 24), (32, 8)):
        assert_equivariant(small_model(MIRRORS, image), random_images(image), group="c2xc2")


def test_blocks_of_c2_are_those_of_e() -> None:
    model = small_model(OCTIC, (24, 24), symmetry="d4:1,c2xc2:1,c2:1")
    assert [type(block).__mro__[2] for block in model.blocks[1:]] == [GroupConvNeXtBlock, FlopConvNeXtBlock]
    assert {key for key in model.state_dict() if "blocks.2.conv_dw" in key} == {
        f"blocks.2.conv_dw.{name}" for name in ("even_to_even", "even_to_odd", "odd_to_even", "odd_to_odd", "bias")
    }


@pytest.mark.parametrize("subgroup", [C2XC2, C2, TRIVIAL], ids=lambda group: group.name)
def test_a_block_of_a_subgroup_starts_from_restricted_features(subgroup: Group) -> None:
    symmetry = f"d4:1,{'x' if subgroup is TRIVIAL else subgroup.name}:1"
    model, x = small_model(OCTIC, (24, 24), symmetry=symmetry, depth=2), random_images((24, 24))
    model.blocks[1].conv_dw.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    seen: list[torch.Tensor] = []
    [first, _] = model.forward_intermediates(x, intermediates_only=True)
    expected = D4.restrict(first.permute(0, 2, 3, 1), subgroup).permute(0, 3, 1, 2)
    torch.testing.assert_close(seen[0], expected)
    assert (first - expected).abs().max() > 0.1


def test_logits_of_an_unpooled_network_are_a_map_that_the_group_moves() -> None:
    model, x = small_model(OCTIC, (24, 24), global_pool=""), random_images((24, 24))
    logits = model(x)
    assert logits.shape == (2, 5, 3, 3)
    for g in D4.elements:
        torch.testing.assert_close(model(g(x)), g(logits))


def test_images_of_any_size_that_fit_the_patches_are_taken() -> None:
    model = small_model(OCTIC, (24, 24))
    assert_equivariant(model, random_images((32, 32)), group="d4")
    with pytest.raises(ValueError, match="image size 24 x 16 is not square"):
        model(random_images((24, 16)))
    with pytest.raises(ValueError, match="image height 20 is not a multiple of the patch height 8"):
        small_model(MIRRORS)(random_images((20, 16)))


def test_a_checkpoint_of_three_channels_is_adapted() -> None:
    source, model = small_model(OCTIC, (24, 24)), small_model(OCTIC, (24, 24), in_chans=1)
    model.load_state_dict(source.state_dict())
    grey = random_images((24, 24), channels=1)
    torch.testing.assert_close(model(grey), source(grey.expand(-1, 3, -1, -1)), atol=1e-6, rtol=1e-6)
    assert max(block_errors(model, grey, "d4").values()) < 1e-10


def test_initial_weights_are_those_of_convnext() -> None:
    torch.manual_seed(0)
    args: dict[str, Any] = {"embed_dim": 128, "depth": 1, "num_classes": 10, "img_size": 16}
    for module in GroupConvNeXtIso("d4", **args).modules():
        for key, parameter in module.named_parameters(recurse=False):
            expected = 0.02 if parameter.ndim > 1 else 0.0
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), (type(module).__name__, key)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        (OCTIC, {"img_size": (24, 24), "embed_dim": 12}, "embed_dim is 12, .* 8 equal parts"),
        (MIRRORS, {"embed_dim": 18}, "embed_dim is 18, .* 4 equal parts"),
        (OCTIC, {"img_size": (24, 16)}, "image size 24 x 16 is not square"),
        (OCTIC, {"img_size": (24, 24), "patch_size": (8, 4)}, "patch_size 8 x 4 is not square"),
        (MIRRORS, {"img_size": (20, 24)}, "image height 20"),
        (MIRRORS, {"dims": (16,)}, "use embed_dim"),
        (MIRRORS, {"use_grn": True}, "one kind of block"),
        (MIRRORS, {"global_pool": "max"}, "global_pool='max' is unknown"),
    ],
)
def test_settings_that_break_equivariance_are_refused(name: str, args: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(name, **args)
