"""Layers that commute with a group: the law, dense twins, and equality with the layers of the flop."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flopeq.groups import C2, C2XC2, D4, TRIVIAL, Group
from flopeq.layers import FlopGELU, FlopLayerNorm, FlopLayerScale, FlopLinear, FlopMlp
from flopeq.layers.group import GroupGELU, GroupLayerNorm, GroupLayerScale, GroupLinear, GroupMlp, add_residual
from flopeq.square import IDENTITY
from flopeq.testing import relative_error
from tests.models.conftest import randomize_parameters

GROUPS = [C2, C2XC2, D4]

groups = pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)

POINTWISE: dict[str, Callable[[Group], nn.Module]] = {
    "linear": lambda group: GroupLinear(group, 16, 24),
    "linear without bias": lambda group: GroupLinear(group, 16, 16, bias=False),
    "norm": lambda group: GroupLayerNorm(group, 16, eps=1e-3),
    "norm that counts parts once": lambda group: GroupLayerNorm(group, 16, squared_dims=False),
    "scale": lambda group: GroupLayerScale(group, 16, 0.5),
    "gelu": GroupGELU,
    "mlp": lambda group: GroupMlp(group, 16, 32),
    "normed mlp": lambda group: GroupMlp(group, 16, 32, 8, norm_layer=partial(GroupLayerNorm, group)),
}


def drawn(layer: nn.Module) -> nn.Module:
    return randomize_parameters(layer.double().eval())


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def assert_commutes(layer: Callable[[Tensor], Tensor], group: Group, x: Tensor) -> None:
    y = layer(x)
    for g in group.elements:
        assert relative_error(layer(group.act(g, x)), group.act(g, y)) < 1e-10, str(g)
        assert g == IDENTITY or relative_error(group.act(g, y), y) > 1e-3, "the law would be vacuous"


@groups
@pytest.mark.parametrize("name", POINTWISE)
def test_a_layer_commutes_and_takes_parts(name: str, group: Group) -> None:
    layer, x = drawn(POINTWISE[name](group)), features(2, 5, 16)
    assert_commutes(layer, group, x)
    parts = layer(group.split(x))
    assert isinstance(parts, tuple) and len(parts) == len(group.irreps)
    torch.testing.assert_close(group.join(parts), layer(x))


def dense(layer: GroupLinear) -> tuple[Tensor, Tensor]:
    """The matrix of a linear layer in the regular basis, and its bias there."""
    group = layer.group
    blocks = [weight for irrep in group.irreps for weight in [layer.get_submodule(irrep.name).weight] * irrep.dim]
    outer, inner = (group.fourier_matrix(width) for width in (layer.out_features, layer.in_features))
    bias = layer.get_submodule(group.irreps[0].name).bias
    return outer.T @ torch.block_diag(*blocks) @ inner, outer.T @ F.pad(bias, (0, layer.out_features - len(bias)))


@groups
def test_a_linear_layer_is_a_dense_matrix_that_commutes_with_the_permutations(group: Group) -> None:
    layer, x = drawn(GroupLinear(group, 16, 24)), features(3, 16)
    weight, bias = dense(layer)
    x_regular, y_regular = group.restrict(x, TRIVIAL), group.restrict(layer(x), TRIVIAL)
    torch.testing.assert_close(F.linear(x_regular, weight, bias), y_regular)
    for g in group.elements:
        inner, outer = (
            group.restrict(group.act(g, group.unrestrict(torch.eye(width, dtype=torch.float64), TRIVIAL)), TRIVIAL).T
            for width in (16, 24)
        )
        torch.testing.assert_close(outer @ weight, weight @ inner)
        torch.testing.assert_close(outer @ bias, bias)
    assert sum(p.numel() for p in layer.parameters()) == 16 * 24 // group.order + 24 // group.order


@groups
def test_gelu_acts_in_the_regular_basis(group: Group) -> None:
    x, fourier = features(3, 16), group.fourier_matrix(16)
    torch.testing.assert_close(GroupGELU(group)(x), F.gelu(x @ fourier) @ fourier.T)


@groups
@pytest.mark.parametrize("squared_dims", [True, False])
def test_layer_norm_equals_its_formula(group: Group, squared_dims: bool) -> None:
    layer, x = drawn(GroupLayerNorm(group, 32, eps=1e-3, squared_dims=squared_dims)), features(3, 5, 32)
    copies = 32 // group.order
    rows = [row for irrep, part in zip(group.irreps, group.split(x), strict=True)
            for row in ([part] if irrep.dim == 1 else part.unbind(-2))]  # fmt: skip
    centred = torch.cat([row - row.mean(-1, keepdim=True) for row in rows], -1)
    variance = centred.square().mean(-1, keepdim=True) + 1e-3 / group.order
    if group is D4 and not squared_dims:
        variance = (centred[..., :16].square().sum(-1, keepdim=True) / 4
                    + centred[..., 16:].square().sum(-1, keepdim=True) / 16 + 1e-3) / 8  # fmt: skip
    weights = layer.weight if group is not D4 else torch.cat((layer.weight, layer.weight[16:]))
    expected = centred / variance.sqrt() * weights + F.pad(layer.bias, (0, 32 - copies))
    torch.testing.assert_close(layer(x), expected)
    assert len(layer.bias) == copies


def test_equal_variances_come_out_at_1_or_at_1_6_as_in_octic_vits() -> None:
    x = features(2000, 64)
    for squared_dims, expected in ((True, 1.0), (False, 1.6)):
        y = GroupLayerNorm(D4, 64, squared_dims=squared_dims).double()(x)
        assert y.var().item() == pytest.approx(expected, rel=0.1)


def test_layer_norm_takes_statistics_in_float32() -> None:
    layer, x = GroupLayerNorm(D4, 64), 300 + torch.randn(4, 64)
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x.bfloat16().float()), atol=0.02, rtol=0.01)


@pytest.mark.parametrize(
    ("ours", "flops"),
    [
        (lambda: GroupLinear(C2, 16, 24), lambda: FlopLinear(16, 24)),
        (lambda: GroupLayerNorm(C2, 16, eps=1e-3), lambda: FlopLayerNorm(16, eps=1e-3)),
        (lambda: GroupLayerScale(C2, 16, 0.5), lambda: FlopLayerScale(16, 0.5)),
        (lambda: GroupGELU(C2), FlopGELU),
        (lambda: GroupMlp(C2, 16, 32), lambda: FlopMlp(16, 32)),
    ],
    ids=["linear", "norm", "scale", "gelu", "mlp"],
)
def test_with_c2_a_layer_equals_the_flops_on_the_same_state_dict(ours, flops) -> None:
    theirs, layer, x = drawn(flops()), ours().double().eval(), features(2, 5, 16)
    assert list(layer.state_dict()) == list(theirs.state_dict())
    layer.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(layer(x), theirs(x), atol=1e-12, rtol=1e-12)


@groups
def test_a_constant_on_features_that_the_group_changes_is_refused(group: Group) -> None:
    for irrep in group.irreps[1:]:
        layer = drawn(GroupLinear(group, 16, 16))
        one = layer.get_submodule(irrep.name)
        one.bias = nn.Parameter(torch.ones(one.out_features, dtype=torch.float64))
        with pytest.raises(ValueError, match=f"layer of {irrep.name} features has a bias, 'bias'"):
            layer(features(3, 16))


@groups
def test_one_wrong_sign_breaks_the_law(group: Group) -> None:
    """A layer that negates one part less than the group does: gelu in a basis with a wrong sign."""

    def wrong(x: Tensor) -> Tensor:
        first, *others = group.to_regular(group.split(x))
        return group.join(group.from_regular([F.gelu(first), *(F.gelu(-part) for part in others)]))

    with pytest.raises(AssertionError):
        assert_commutes(wrong, group, features(2, 5, 16))


@groups
def test_stochastic_depth_drops_all_parts_of_an_image_or_none(group: Group) -> None:
    x, update = features(64, 5, 16), features(64, 5, 16) + 3
    y = group.join(add_residual(group, group.split(x), group.split(update), nn.Dropout1d(0.5).train()))
    kept = (y - x).flatten(1).abs() > 1e-9
    assert (kept.all(1) | ~kept.any(1)).all() and kept.any() and not kept.all()
    y = group.join(add_residual(group, group.split(x), group.split(update), nn.Identity()))
    torch.testing.assert_close(y, x + update)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupLinear(D4, 12, 16), "in_features is 12, .* 8 equal parts"),
        (lambda: GroupLinear(C2XC2, 16, 18), "out_features is 18, .* 4 equal parts"),
        (lambda: GroupLayerNorm(D4, 20), "num_channels is 20"),
        (lambda: GroupLayerScale(C2, 5), "num_channels is 5"),
    ],
)
def test_widths_that_do_not_split_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_layer_names_the_widths_of_its_irreps() -> None:
    assert "2a1+2a2+2b1+2b2+4e -> 1a1+1a2+1b1+1b2+2e" in str(GroupLinear(D4, 16, 8))
