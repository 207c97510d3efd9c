"""ResMLPs for larger groups: equality with E for C2, heads, refusals. `test_group_models.py` has the rest."""

from __future__ import annotations

import pytest
import torch

from flopeq.groups import D4, TRIVIAL
from flopeq.models.group_resmlp import GroupMlpMixer
from flopeq.testing import assert_equivariant
from tests.models.conftest import EVEN_IMAGE, IMAGE, SQUARE, random_images, small_group_model, small_model


@pytest.mark.parametrize("image", [IMAGE, EVEN_IMAGE], ids=["odd grid", "even grid"])
def test_with_c2_the_network_is_e_on_the_same_state_dict(image: tuple[int, int]) -> None:
    e, x = small_model("flop_resmlp_base_24_224", image), random_images(image)
    ours = GroupMlpMixer("c2", img_size=image, patch_size=8, num_blocks=3, embed_dim=16, num_classes=5).double().eval()
    ours.load_state_dict(e.state_dict())
    torch.testing.assert_close(ours(x), e(x), atol=1e-12, rtol=1e-12)
    for found, expected in zip(*(model.forward_intermediates(x)[1] for model in (ours, e)), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("head", "width"), [("trivial", 2), ("power", 12)])
def test_heads_see_all_pairs_of_equal_irreps_and_power_the_norms_too(head: str, width: int) -> None:
    model = small_group_model("d4 resmlp", head=head)
    x = model.forward_features(random_images(SQUARE))
    found = model.invariants(x)
    assert found.shape == (2, 25, width) and model.head_hidden_size == width
    average = torch.zeros_like(x)
    to_places = model.stem.reorder
    grid = model.to_raster["d4"](x).mT.unflatten(-1, (5, 5))
    for g in D4.elements:
        average += to_places(D4.act_on_grid(g, grid).flatten(2).mT) / D4.order
    assert found[..., :2].norm().item() == pytest.approx(average.norm().item())
    if head == "power":
        _, a2, b1, b2, e = D4.split(x)
        expected = torch.cat((a2.abs(), b1.abs(), b2.abs(), e.square().sum(-2).sqrt()), -1)
        torch.testing.assert_close(found[..., 2:], expected)


def test_the_smallest_grids_lack_irreps_and_keep_the_law() -> None:
    for image in ((8, 8), (16, 16)):
        for case, group in (("d4 resmlp", "d4"), ("c2xc2 resmlp", "c2xc2"), ("graded resmlp", "c2")):
            assert_equivariant(small_group_model(case, image), random_images(image), group=group)


def test_features_of_an_ordinary_last_block_are_in_raster_order() -> None:
    model, x = small_group_model("hybrid of d4 resmlp"), random_images(SQUARE)
    last, grids = model.forward_intermediates(x)
    torch.testing.assert_close(model.norm(grids[-1].flatten(2).mT), last)
    assert model.last_tokens.group is TRIVIAL


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"mlp_ratio": (0.5, 4.0)}, "not a number"),
        ({"embed_dim": 12}, "embed_dim is 12, .* 8 equal parts"),
        ({"img_size": (40, 32)}, "not square"),
        ({"dynamic_img_size": True}, "token mixing has a weight for every pair of tokens"),
        ({"norm_layer": "layernorm"}, "norm_layer"),
        ({"head": "even"}, "head='even' is unknown"),
        ({"symmetry": "d4:2", "head": "power"}, "no effect after ordinary blocks"),
    ],
)
def test_settings_that_break_equivariance_are_refused(args: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_group_model("d4 resmlp", **args)
