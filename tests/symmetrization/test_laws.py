"""The laws of symmetrized networks, in float64 to 1e-10."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import flopeq
from flopeq.square import FLIP, FLOP, IDENTITY, QUARTER_TURN, Symmetry, symmetry_group
from flopeq.symmetrization.features import final_action, intermediate_action
from flopeq.symmetrization.outputs import grid, permute_channels
from tests.symmetrization.networks import EQUIVARIANT, KINDS, assert_close, dense, random_images, tiny

HOW = ("average", "weighted", "choose", "canonical")

GROUPS = ("flop", "flip", "turn", "c4", "flop*flip", "d4")


def symmetrized(model: nn.Module, group, how="average", **args) -> flopeq.Symmetrized:
    """The network; one that weighs does so with random weights, not with those of the average."""
    torch.manual_seed(4)
    result = flopeq.symmetrize(model, group, how, **args)
    if how == "weighted":
        nn.init.normal_(result.weight_net.fc2.weight)
    return result


def slow_average(model, group, images, action=lambda g, y: y):
    """One image and one element of the group at a time."""
    results = []
    for image in images:
        total = 0
        for g in symmetry_group(group):
            total = total + action(g.inverse, model(g(image)[None]))
        results.append(total / len(symmetry_group(group)))
    return torch.cat(results)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_features_commute_with_every_element(kind: str, how: str) -> None:
    model, x = tiny(kind), random_images()
    for group in ("flop*flip", "d4"):
        f = symmetrized(model, group, how)
        act = final_action(model, f.group, (16, 16))
        logits, features = f(x), f.forward_features(x)
        final, blocks = f.forward_intermediates(x)
        assert_close(final, features)
        assert max((model(g(x)) - model(x)).abs().max() for g in f.group) > 1e-3  # the law is not vacuous
        for g in f.group:
            assert_close(f(g(x)), logits)
            assert_close(f.forward_features(g(x)), act(g, features))
            turned = f.forward_intermediates(g(x), intermediates_only=True)
            for position, (block, found) in enumerate(zip(blocks, turned, strict=True)):
                assert_close(found, intermediate_action(model, f.group, None, position)(g, block))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("group", GROUPS)
def test_every_group_leaves_the_logits_alone_and_the_network_alone_does_not(group: str, how: str) -> None:
    model, x = tiny("vit"), random_images()
    f = symmetrized(model, group, how)
    logits = f(x)
    for g in f.group:
        assert_close(f(g(x)), logits)
        assert g == IDENTITY or (model(g(x)) - model(x)).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["average", "choose", "canonical"])
@pytest.mark.parametrize("group", GROUPS)
def test_grids_turn_with_the_image(group: str, how: str) -> None:
    model, x = dense(), random_images()
    f = symmetrized(model, group, how, output="grid")
    for g in f.group:
        assert_close(f(g(x)), g(f(x)))


@pytest.mark.parametrize("group", ["flop", "d4"])
def test_the_average_equals_a_slow_loop(group: str) -> None:
    model, x = tiny("resnet"), random_images(3)
    for batched in (True, False):
        assert_close(flopeq.symmetrize(model, group, batched=batched)(x), slow_average(model, group, x))
    f = flopeq.symmetrize(dense(), group, output="grid")
    assert_close(f(x), slow_average(f.model, group, x, lambda g, y: g(y)))


@pytest.mark.parametrize("how", HOW)
def test_passes_in_one_batch_and_one_after_the_other_are_equal(how: str) -> None:
    model, x = tiny("vit"), random_images()
    together, alone = (symmetrized(model, "d4", how, batched=batched) for batched in (True, False))
    assert_close(together(x), alone(x))
    assert_close(together.forward_features(x), alone.forward_features(x))


def test_the_trivial_group_changes_nothing() -> None:
    model, x = tiny("vit"), random_images()
    for how in HOW:
        f = symmetrized(model, "trivial", how)
        assert_close(f(x), model(x))
        assert_close(f.forward_features(x), model.forward_features(x))


@pytest.mark.parametrize("group", ["flop", "d4"])
def test_symmetrizing_twice_changes_nothing(group: str) -> None:
    once, x = flopeq.symmetrize(tiny("vit"), group), random_images()
    twice = flopeq.symmetrize(once, group)
    assert_close(twice(x), once(x))
    assert_close(twice.forward_features(x), once.forward_features(x))
    mask = flopeq.symmetrize(dense(), group, output="grid")
    assert_close(flopeq.symmetrize(mask, group, output="grid")(x), mask(x))


@pytest.mark.parametrize("kind", EQUIVARIANT)
def test_an_equivariant_network_is_its_own_symmetrization(kind: str) -> None:
    model, x = tiny(kind), random_images()
    f = flopeq.symmetrize(model, "flop")
    assert_close(f(x), model(x))
    assert_close(f.forward_features(x), model.forward_features(x))
    for found, expected in zip(f.forward_intermediates(x)[1], model.forward_intermediates(x)[1], strict=True):
        assert_close(found, expected)
    assert_close(f.forward_head(f.forward_features(x)), model(x))


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_the_gradient_is_the_mean_of_the_gradients(kind: str) -> None:
    model, x = tiny(kind), random_images()
    group = symmetry_group("d4")
    parameters = list(model.parameters())
    found = torch.autograd.grad(flopeq.symmetrize(model, "d4")(x).square().sum(1).mean(), parameters)
    factor = 2 * flopeq.symmetrize(model, "d4")(x).detach() / len(x)
    each = [torch.autograd.grad((factor * model(g(x))).sum(), parameters) for g in group]
    for gradient, *terms in zip(found, *each, strict=True):
        assert_close(gradient, torch.stack(terms).mean(0))


def test_the_gradient_of_an_image_turns_with_it() -> None:
    f, x = flopeq.symmetrize(tiny("vit"), "d4"), random_images()
    gradient = image_gradient(f, x)
    for g in f.group:
        assert_close(image_gradient(f, g(x)), g(gradient))


def image_gradient(f: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x).square().sum(), x)[0]


def test_one_wrong_inverse_breaks_the_law() -> None:
    """The laws above can fail: with one element's output mapped the wrong way, they do."""

    def wrong(g: Symmetry, y: Tensor) -> Tensor:
        return grid(g.inverse if g == QUARTER_TURN else g, y)

    f, x = flopeq.symmetrize(dense(), "c4", output=wrong), random_images()
    assert (f(QUARTER_TURN(x)) - QUARTER_TURN(f(x))).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["vit", "resnet", "E(convnext)"])
def test_weights_start_as_the_average(kind: str) -> None:
    model, x = tiny(kind), random_images()
    weighted, mean = flopeq.symmetrize(model, "d4", "weighted"), flopeq.symmetrize(model, "d4")
    assert_close(weighted(x), mean(x))
    nn.init.constant_(weighted.weight_net.fc2.bias, 7.0)
    assert_close(weighted(x), mean(x))
    assert (symmetrized(model, "d4", "weighted")(x) - mean(x)).abs().max() > 1e-3


def test_the_network_of_the_weights_has_a_gradient() -> None:
    f = symmetrized(tiny("vit"), "flop", "weighted")
    f(random_images()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in f.weight_net.parameters())
    assert f.weight_net.fc1.weight.grad.abs().max() > 0


def test_choose_takes_the_pass_with_the_largest_probability() -> None:
    model, x = tiny("vit"), random_images(4)
    f = flopeq.symmetrize(model, "d4", "choose")
    passes = torch.stack([model(g(x)) for g in f.group])
    best = passes.softmax(2).amax(2).argmax(0)
    assert_close(f(x), passes[best, torch.arange(4)])
    assert len(set(best.tolist())) > 1
    assert_close(f.forward_head(f.forward_features(x)), f(x))
    assert not f.ties(x).any()


def test_choose_reports_ties_between_different_images_only() -> None:
    class Brightness(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    f, x = flopeq.symmetrize(Brightness(), "flop", "choose"), random_images()
    x[1] = x[1] + x[1].flip(-1)
    assert f.ties(x).tolist() == [True, False]
    with pytest.raises(ValueError, match="no ties"):
        flopeq.symmetrize(Brightness(), "flop").ties(x)


def test_canonical_reports_ties_and_is_right_for_images_that_are_their_own_mirror_image() -> None:
    f, x = flopeq.symmetrize(tiny("vit"), "d4", "canonical"), random_images(3)
    x[1] = x[1] + x[1].flip(-1)
    x[2] -= x[2].sum(0, keepdim=True) / 3  # its channels add up to zero, and so do those of all of its views
    assert f.ties(x).tolist() == [False, False, True]
    for g in f.group:
        assert_close(f(g(x[:2])), f(x[:2]))


def test_canonical_is_one_pass_of_an_orbits_image() -> None:
    model, x = tiny("vit"), random_images()
    calls = []
    model.register_forward_hook(lambda module, args, result: calls.append(len(args[0])))
    f = flopeq.symmetrize(model, "d4", "canonical")
    result = f(x)
    assert calls == [2]
    passes = torch.stack([model(g(x)) for g in f.group])
    assert ((passes - result).abs().amax(2) < 1e-10).any(0).all()


def test_two_calls_agree() -> None:
    x = random_images()
    for how in HOW:
        f = symmetrized(tiny("vit"), "d4", how)
        assert torch.equal(f(x), f(x))
        assert torch.equal(symmetrized(tiny("vit"), "d4", how)(x), f(x))


def test_channels_are_permuted() -> None:
    model, x = dense(4), random_images()
    f = flopeq.symmetrize(model, "flop", output={FLOP: [1, 0, 2, 3]})
    swap = [1, 0, 2, 3]
    assert_close(f(FLOP(x)), f(x)[:, swap])
    heatmaps = flopeq.symmetrize(model, "flop*flip", output=permute_channels({FLOP: swap, FLIP: [0, 1, 3, 2]}, True))
    assert_close(heatmaps(FLOP(x)), FLOP(heatmaps(x))[:, swap])
    assert_close(heatmaps(FLIP(x)), FLIP(heatmaps(x))[:, [0, 1, 3, 2]])
    assert_close(heatmaps((FLOP @ FLIP)(x)), (FLOP @ FLIP)(heatmaps(x))[:, [1, 0, 3, 2]])
    turned = flopeq.symmetrize(model, "d4", output=permute_channels({QUARTER_TURN: [1, 2, 3, 0], FLOP: [0, 3, 2, 1]}))
    for g in turned.group:
        assert_close(turned(g(x)), turned.output(g, turned(x)))


@pytest.mark.parametrize("permutations", [{FLOP: [1, 2, 0]}, {FLOP: [0, 0, 1]}, {FLOP: [1, 0], FLIP: [0, 1, 2]}, {}])
def test_wrong_permutations_are_refused(permutations) -> None:
    with pytest.raises(ValueError, match="permutation"):
        permute_channels(permutations)


def test_permutations_that_do_not_fit_are_refused() -> None:
    f, x = flopeq.symmetrize(dense(3), "d4", output={FLOP: [1, 0, 2]}), random_images()
    with pytest.raises(ValueError, match="no permutation"):
        f(x)
    with pytest.raises(ValueError, match="2 channels"):
        flopeq.symmetrize(dense(3), "flop", output={FLOP: [1, 0]})(x)


def test_an_output_may_have_an_action_of_its_own() -> None:
    """Coordinates (u, v) of a point, with the origin in the middle of the image: the flop negates u."""

    def action(g: Symmetry, points: Tensor) -> Tensor:
        return points * points.new_tensor([-1.0, 1.0]) if g == FLOP else points

    f, x = flopeq.symmetrize(tiny("resnet", num_classes=2), "flop", output=action), random_images()
    assert_close(f(FLOP(x)), action(FLOP, f(x)))


@pytest.mark.parametrize("group", ["c4", "d4", "transpose"])
def test_images_that_are_not_square_are_refused_for_quarter_turns(group: str) -> None:
    f = flopeq.symmetrize(tiny("resnet"), group)
    with pytest.raises(ValueError, match="16 x 24 are not square.*flop\\*flip"):
        f(random_images(1, 16, 24))
    with pytest.raises(ValueError, match="not square"):
        f.forward_features(random_images(1, 16, 24))
    mirrored = flopeq.symmetrize(tiny("vit", img_size=(16, 24)), "flop*flip")
    x = random_images(1, 16, 24)
    for g in mirrored.group:
        assert_close(mirrored(g(x)), mirrored(x))


def test_wrong_arguments_are_refused() -> None:
    for arguments, message in (
        ({"how": "mean"}, "'mean' is unknown"), ({"output": "mask"}, "'mask' is unknown"),
        ({"group": "c8"}, "'c8' is unknown"), ({"group": [IDENTITY, QUARTER_TURN]}, "not a group"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            flopeq.symmetrize(tiny("resnet"), **arguments)
    with pytest.raises(ValueError, match="Dense does not have"):
        flopeq.symmetrize(dense(), "flop", "weighted")
    with pytest.raises(ValueError, match="have none"):
        flopeq.symmetrize(dense(1), "flop", "choose")(random_images())
    with pytest.raises(ValueError, match="tuple"):
        flopeq.symmetrize(TwoOutputs(), "flop")(random_images())


class TwoOutputs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x
