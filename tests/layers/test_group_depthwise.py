"""The depthwise convolution of a group: the law on all grids, its dense twin, and its cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flopeq.backends import depthwise
from flopeq.groups import C2, C2XC2, D4, TRIVIAL, Group
from flopeq.layers.group import GroupDepthwiseConv
from flopeq.layers.group.depthwise import symmetries_of_copies
from flopeq.measure.flops import complexity
from flopeq.square import FLOP, IDENTITY
from flopeq.testing import relative_error
from tests.layers.test_group_layers import drawn, features, groups

GRIDS = [(4, 4), (5, 5), (2, 2), (1, 1)]
OBLONG = [(3, 6), (8, 5)]
CASES = [(group, grid) for group in (C2, C2XC2, D4) for grid in (GRIDS if group.transposes else GRIDS + OBLONG)]


def assert_commutes(layer: GroupDepthwiseConv, x_BCHW: Tensor) -> None:
    y = layer(x_BCHW)
    assert y.shape == x_BCHW.shape
    for g in layer.group.elements:
        moved = layer.group.act_on_grid(g, x_BCHW)
        assert relative_error(layer(moved), layer.group.act_on_grid(g, y)) < 1e-10, str(g)
        assert g == IDENTITY or relative_error(layer(moved), y) > 1e-3, "the law would be vacuous"


@pytest.mark.parametrize("kernel_size", [3, 7])
@pytest.mark.parametrize(("group", "grid"), CASES, ids=lambda value: getattr(value, "name", value))
def test_depthwise_convolution_commutes_on_even_and_odd_grids(
    group: Group, grid: tuple[int, int], kernel_size: int
) -> None:
    assert_commutes(drawn(GroupDepthwiseConv(group, 16, kernel_size)), features(2, 16, *grid))


@groups
def test_the_symmetries_of_the_copies_are_all_of_the_group(group: Group) -> None:
    symmetries = symmetries_of_copies(group)
    assert symmetries[0] == IDENTITY and sorted(symmetries) == list(group.elements)


@groups
def test_a_kernel_of_another_symmetry_breaks_the_law(group: Group) -> None:
    layer = drawn(GroupDepthwiseConv(group, 16, 3))
    *first, last = layer.symmetries
    layer.symmetries = (*first, FLOP @ last)
    with pytest.raises(AssertionError):
        assert_commutes(layer, features(2, 16, 5, 5))


@groups
def test_a_bias_of_one_copy_breaks_the_law(group: Group) -> None:
    layer = drawn(GroupDepthwiseConv(group, 16, 3))

    def with_bias(x_BCHW: Tensor) -> Tensor:
        ones = torch.zeros(16, dtype=torch.float64).index_fill(0, torch.tensor(0), 1.0)
        return layer(x_BCHW) + group.unrestrict(ones, TRIVIAL)[:, None, None]

    x_BCHW = features(2, 16, 4, 4)
    errors = [
        relative_error(with_bias(group.act_on_grid(g, x_BCHW)), group.act_on_grid(g, with_bias(x_BCHW)))
        for g in group.elements[1:]
    ]
    assert min(errors) > 1e-3


@groups
def test_it_is_a_dense_convolution_that_commutes_with_the_group(group: Group) -> None:
    layer, x_BCHW = drawn(GroupDepthwiseConv(group, 16, 5)), features(2, 16, 4, 4)
    fourier = group.fourier_matrix(16)
    dense = torch.einsum("or,rhw,ir->oihw", fourier, layer.kernel()[:, 0], fourier)
    bias = fourier @ layer.bias.repeat(group.order)
    torch.testing.assert_close(F.conv2d(x_BCHW, dense, bias, padding=2), layer(x_BCHW))
    for g in group.elements:
        rho = group.act(g, torch.eye(16, dtype=torch.float64)).T
        torch.testing.assert_close(torch.einsum("op,pqhw,iq->oihw", rho, g(dense), rho), dense)
        torch.testing.assert_close(group.act(g, bias), bias)


@pytest.mark.parametrize(("group", "subgroup"), [(C2XC2, C2), (D4, C2), (D4, C2XC2)], ids=lambda group: group.name)
def test_restricted_features_meet_kernels_of_the_subgroup(group: Group, subgroup: Group) -> None:
    layer, x_BCHW = drawn(GroupDepthwiseConv(group, 16, 3)), features(2, 16, 4, 4)
    restricted = GroupDepthwiseConv(subgroup, 16, 3).double()
    with torch.no_grad():
        restricted.weight.copy_(layer.kernel()[: 16 // subgroup.order])
        restricted.bias.copy_(layer.bias.repeat(group.order // subgroup.order))

    def restrict(y_BCHW: Tensor) -> Tensor:
        return group.restrict(y_BCHW.movedim(1, -1), subgroup).movedim(-1, 1)

    torch.testing.assert_close(restricted(restrict(x_BCHW)), restrict(layer(x_BCHW)))


@groups
def test_it_has_a_part_of_the_weights_and_costs_what_an_ordinary_one_does(group: Group) -> None:
    layer = GroupDepthwiseConv(group, 16, 7)
    assert sum(p.numel() for p in layer.parameters()) == 16 * (49 + 1) // group.order
    assert complexity(layer, (16, 6, 6)).macs == 49 * 16 * 36


def test_compiled_training_uses_the_summed_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x_BCHW, gradients = drawn(GroupDepthwiseConv(D4, 16, 3)).float(), torch.randn(2, 16, 4, 4), []
    for enabled in (True, False):
        monkeypatch.setattr(depthwise, "_enabled", enabled)
        torch._dynamo.reset()
        layer.zero_grad()
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x_BCHW).tanh().square().sum().backward()
        gradients.append([parameter.grad for parameter in layer.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)
    assert not all(map(torch.equal, *gradients)), "both gradients were computed in the same way"


@pytest.mark.parametrize(
    ("args", "message"),
    [((D4, 12), "num_channels is 12, .* 8 equal parts"), ((C2XC2, 16, 4), "kernel_size=4 has no middle")],
)
def test_widths_and_kernels_that_do_not_fit_are_refused(args: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupDepthwiseConv(*args)
