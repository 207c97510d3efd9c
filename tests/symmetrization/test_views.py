"""Several images with a group each, and products of groups: laws, numbers of passes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import flopeq
from flopeq.measure.flops import count_operations
from flopeq.square import FLIP, FLOP, IDENTITY, QUARTER_TURN, TURN, symmetry_group
from tests.symmetrization.networks import assert_close, dense, random_images, tiny

IMAGES = [random_images(seed=5), random_images(seed=6), random_images(seed=7)]


def encoders(number: int) -> list[nn.Module]:
    return [tiny(kind) for kind in ("vit", "resnet", "resmlp")[:number]]


def head(number: int) -> nn.Module:
    torch.manual_seed(8)
    return nn.Sequential(nn.Linear(5 * number, 7), nn.Tanh(), nn.Linear(7, 4)).double()


class Fuse(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.head = head(number)

    def forward(self, outputs: list[Tensor]) -> Tensor:
        return self.head(torch.cat(outputs, dim=1))


def count_images(model: nn.Module) -> list[int]:
    """A list to which the network appends how many images it is called with."""
    seen: list[int] = []
    model.register_forward_hook(lambda module, args, result: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize("full", [False, True])
def test_every_image_may_turn_on_its_own(full: bool) -> None:
    groups = ["c4", "flop", "d4"]
    f = flopeq.MultiView(encoders(3), groups, fuse=Fuse(3), full=full)
    expected = f(*IMAGES)
    assert expected.shape == (2, 4)
    for position, group in enumerate(groups):
        for g in symmetry_group(group):
            turned = [g(x) if i == position else x for i, x in enumerate(IMAGES)]
            assert_close(f(*turned), expected)
    assert (flopeq.MultiView(encoders(3), "trivial", fuse=Fuse(3))(FLOP(IMAGES[0]), *IMAGES[1:])
            - flopeq.MultiView(encoders(3), "trivial", fuse=Fuse(3))(*IMAGES)).abs().max() > 1e-3  # fmt: skip


@pytest.mark.parametrize("full", [False, True])
def test_every_grid_turns_with_its_image_alone(full: bool) -> None:
    groups, images = ["c4", "flop"], IMAGES[:2]
    f = flopeq.MultiView([dense(), dense()], groups, exchange=[dense(), dense()], output="grid", full=full)
    first, second = f(*images)
    for g in symmetry_group("c4"):
        for h in symmetry_group("flop"):
            turned = f(g(images[0]), h(images[1]))
            assert_close(turned[0], g(first))
            assert_close(turned[1], h(second))
    changed = f(images[0], images[1] + 1)
    assert (changed[0] - first).abs().max() > 1e-3


@pytest.mark.parametrize("output", ["invariant", "grid"])
def test_the_efficient_design_is_the_full_one_for_sums(output: str) -> None:
    args = {"exchange": [dense(), dense(), dense()], "output": output}
    efficient = flopeq.MultiView([dense()] * 3, ["c4", "flop", "flip"], **args)
    for batched in (True, False):
        full = flopeq.MultiView([dense()] * 3, ["c4", "flop", "flip"], full=True, batched=batched, **args)
        full.load_state_dict(efficient.state_dict())
        for found, expected in zip(full(*IMAGES), efficient(*IMAGES), strict=True):
            assert_close(found, expected)


def test_an_affine_fusion_is_the_same_in_both_designs_and_another_is_not() -> None:
    torch.manual_seed(9)
    affine = nn.Linear(10, 4).double()
    models, images = encoders(2), IMAGES[:2]
    for fuse, same in ((lambda ys: affine(torch.cat(ys, 1)), True), (Fuse(2), False)):
        efficient = flopeq.MultiView(models, "c4", fuse=fuse)(*images)
        full = flopeq.MultiView(models, "c4", fuse=fuse, full=True)(*images)
        assert ((full - efficient).abs().max() < 1e-10) == same


@pytest.mark.parametrize("number", [1, 2, 3])
def test_passes_are_a_sum_or_a_product(number: int) -> None:
    models, images = encoders(number), IMAGES[:number]
    seen = [count_images(model) for model in models]
    flopeq.MultiView(models, "c4", fuse=Fuse(number))(*images)
    assert seen == [[2 * 4]] * number
    flopeq.MultiView(models, "c4", fuse=Fuse(number), full=True)(*images)
    assert [calls[-1] for calls in seen] == [2 * 4**number] * number


def test_images_models_and_groups_must_fit() -> None:
    for arguments, message in (
        ({"groups": ["c4", "flop", "flip"]}, "3 groups do not fit 2 models"),
        ({"groups": "c4", "exchange": [dense()]}, "1 networks for the exchange do not fit 2"),
        ({"groups": "c4", "output": "grid", "fuse": Fuse(2)}, "independently"),
    ):
        with pytest.raises(ValueError, match=message):
            flopeq.MultiView(encoders(2), **arguments)
    f = flopeq.MultiView(encoders(2), (IDENTITY, TURN))
    assert f.groups == [(IDENTITY, TURN)] * 2
    with pytest.raises(ValueError, match="3 images do not fit 2 models"):
        f(*IMAGES)
    with pytest.raises(ValueError, match="not square"):
        flopeq.MultiView([tiny("resnet")], "c4")(random_images(1, 16, 24))


@pytest.mark.parametrize("groups", [("flop", "flip"), ("flop", "turn"), ("transpose", "turn"), ("flip", "trivial")])
def test_a_direct_product_is_equivariant(groups: tuple[str, str]) -> None:
    x = random_images(3)
    f, mask = (
        flopeq.symmetrize_product(tiny("vit"), groups),
        flopeq.symmetrize_product(dense(), groups, output="grid"),
    )
    logits, expected = f(x), mask(x)
    for g in symmetry_group("*".join(groups)):
        assert_close(f(g(x)), logits)
        assert_close(mask(g(x)), g(expected))


def test_a_direct_product_needs_as_many_passes_as_both_groups_have_elements() -> None:
    model, x = tiny("vit"), random_images()
    seen = count_images(model)
    f = flopeq.symmetrize_product(model, ("flop", "flip"))
    f(x)
    assert seen == [2 * (2 + 2)]
    macs = [count_operations(network, x[:1])[0]["linear"] for network in (model, f)]
    assert macs[1] == 4 * macs[0]


def test_an_image_with_a_half_turn_has_invariant_logits_under_a_product() -> None:
    f, x = flopeq.symmetrize_product(tiny("vit"), ("flop", "flip")), random_images()
    x = x + TURN(x)
    for g in (FLOP, FLIP, TURN):
        assert_close(f(g(x)), f(x))


@pytest.mark.parametrize("groups", [("c4", "flop"), ("flop", "c4"), ("d4", "flop"), ("transpose", "flop")])
def test_products_that_are_not_direct_are_refused(groups: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="not direct.*do not commute.*d4"):
        flopeq.symmetrize_product(tiny("vit"), groups)


def test_groups_with_a_common_element_are_refused() -> None:
    with pytest.raises(ValueError, match="the half turn is in both"):
        flopeq.symmetrize_product(tiny("vit"), ("c4", "turn"))
    assert QUARTER_TURN in symmetry_group("c4")
