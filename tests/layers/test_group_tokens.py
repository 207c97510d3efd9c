"""Layers of a ResMLP that commutes with a group: the law, dense twins, and equality with the layers of the flop."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from timm.layers.activations import quick_gelu
from torch import Tensor, nn

from flopeq.groups import C2, C2XC2, D4, TRIVIAL, Group
from flopeq.layers import BiparityAffine, ColumnParity, FlopResBlock
from flopeq.layers.group import (
    GridTokens,
    GroupGridAffine,
    GroupGridLinear,
    GroupGridMlp,
    GroupResBlock,
    GroupTokenMixing,
    InvariantConstants,
    ReorderTokens,
    RestrictFeatures,
)
from flopeq.square import IDENTITY
from flopeq.testing import relative_error
from tests.layers.test_group_layers import drawn, features, groups

SQUARE = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)]

GRIDS = [
    pytest.param(group, grid, id=f"{group.name}-{grid[0]}x{grid[1]}")
    for group, grid in product([C2, C2XC2, D4], [*SQUARE, (2, 5), (3, 4)])
    if not (group.transposes and grid not in SQUARE)
]

grids = pytest.mark.parametrize(("group", "grid"), GRIDS)

LAYERS: dict[str, Callable[[GridTokens], nn.Module]] = {
    "affine": lambda tokens: GroupGridAffine(tokens, 16),
    "linear": lambda tokens: GroupGridLinear(tokens, 16, 24),
    "token mixing": lambda tokens: GroupTokenMixing(tokens),
    "mlp": lambda tokens: GroupGridMlp(tokens, 16, 32),
    "block": lambda tokens: GroupResBlock(tokens, 16, init_values=0.5),
}


def act(group: Group, g, x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
    """The action on tokens in raster order with channels in irreps."""
    return group.act_on_grid(g, x_BNC.mT.unflatten(-1, grid)).flatten(2).mT


def in_raster(layer: nn.Module, tokens: GridTokens) -> Callable[[Tensor], Tensor]:
    """The layer as a function of tokens in raster order."""
    raster = GridTokens(TRIVIAL, tokens.grid_size)
    to_places, back = ReorderTokens(raster, tokens), ReorderTokens(tokens, raster)

    def apply(x: Tensor) -> Tensor:
        if isinstance(layer, GroupGridLinear | GroupGridMlp):
            return back(tokens.group.join(layer(tokens.group.split(to_places(x)))))
        return back(layer(to_places(x)))

    return apply


def assert_commutes(layer: Callable[[Tensor], Tensor], group: Group, grid: tuple[int, int], x: Tensor) -> None:
    y = layer(x)
    for g in group.elements:
        assert relative_error(layer(act(group, g, x, grid)), act(group, g, y, grid)) < 1e-10, str(g)
        assert g == IDENTITY or relative_error(act(group, g, y, grid), y) > 1e-3, "the law would be vacuous"


@grids
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_tokens_commutes(name: str, group: Group, grid: tuple[int, int]) -> None:
    tokens = GridTokens(group, grid)
    assert_commutes(in_raster(drawn(LAYERS[name](tokens)), tokens), group, grid, features(2, tokens.num_tokens, 16))


@grids
def test_tokens_in_irreps_are_acted_on_by_their_matrices(group: Group, grid: tuple[int, int]) -> None:
    tokens, raster = GridTokens(group, grid), GridTokens(TRIVIAL, grid)
    to_places, back = ReorderTokens(raster, tokens), ReorderTokens(tokens, raster)
    x = features(2, tokens.num_tokens, 3)
    parts = tokens.to_irreps(to_places(x))
    torch.testing.assert_close(back(tokens.from_irreps(parts)), x)
    assert sum(part.square().sum().item() for part in parts) == pytest.approx(x.square().sum().item())
    for g in group.elements:
        moved = tokens.to_irreps(to_places(g(x.mT.unflatten(-1, grid)).flatten(2).mT))
        for irrep, part, found in zip(group.irreps, parts, moved, strict=True):
            matrix = torch.tensor(irrep.matrices[g], dtype=torch.float64)
            rows = part if irrep.dim > 1 else part[:, None]
            torch.testing.assert_close(found.view_as(rows), torch.einsum("ij,bjnc->binc", matrix, rows))


@pytest.mark.parametrize(
    ("group", "side", "multiplicities", "saving"),
    [
        (C2, 14, [98, 98], 2.0), (C2XC2, 14, [49] * 4, 4.0), (D4, 14, [28, 21, 21, 28, 49], 5.30),
        (C2, 7, [28, 21], 1.96), (C2XC2, 7, [16, 12, 12, 9], 3.84), (D4, 7, [10, 3, 6, 6, 12], 5.12),
    ],
)  # fmt: skip
def test_numbers_of_tokens_and_what_mixing_saves(group, side: int, multiplicities: list[int], saving: float) -> None:
    tokens = GridTokens(group, (side, side))
    assert tokens.multiplicities == multiplicities
    cost = sum(irrep.dim * n**2 for irrep, n in zip(group.irreps, multiplicities, strict=True))
    assert tokens.num_tokens**2 / cost == pytest.approx(saving, abs=0.005)
    assert sum(p.numel() for p in GroupTokenMixing(tokens).parameters()) == sum(n**2 + n for n in multiplicities)


@grids
def test_token_mixing_is_a_dense_matrix_that_commutes_with_the_permutations(group: Group, grid) -> None:
    tokens, raster = GridTokens(group, grid), GridTokens(TRIVIAL, grid)
    layer, identity = drawn(GroupTokenMixing(tokens)), torch.eye(tokens.num_tokens, dtype=torch.float64)
    blocks = []
    for irrep in group.irreps:
        if hasattr(layer, irrep.name):
            nn.init.zeros_(layer.get_submodule(irrep.name).bias)
            blocks += [layer.get_submodule(irrep.name).weight] * irrep.dim
    parts = tokens.to_irreps(ReorderTokens(raster, tokens)(identity[None]))
    basis = torch.cat([part.flatten(0, -2) for part in parts])
    torch.testing.assert_close(basis @ basis.T, identity)
    dense = basis.T @ torch.block_diag(*blocks) @ basis
    for g in group.elements:
        moved = g(identity.unflatten(-1, grid)).flatten(1)
        torch.testing.assert_close(dense @ moved, moved @ dense)
    x = features(2, tokens.num_tokens, 16)
    torch.testing.assert_close(in_raster(layer, tokens)(x), dense @ x)


@grids
def test_constants_are_invariant_and_fill_the_pairs_of_equal_irreps(group: Group, grid: tuple[int, int]) -> None:
    tokens = GridTokens(group, grid)
    widths = [2 * irrep.dim for irrep in group.irreps]
    vectors = [features(width) for width in widths]
    constant = group.join(InvariantConstants(tokens).double()(vectors))[None]
    back = ReorderTokens(tokens, GridTokens(TRIVIAL, grid))
    for g in group.elements:
        torch.testing.assert_close(act(group, g, back(constant), grid), back(constant))
    for index, (irrep, part) in enumerate(zip(group.irreps, tokens.to_irreps(constant), strict=True)):
        for other, found in enumerate(group.split(part)):
            expected = torch.zeros_like(found)
            if other == index and irrep.dim == 1:
                expected += vectors[index]
            elif other == index:
                expected[:, 0, :, 0] = expected[:, 1, :, 1] = vectors[index]
            torch.testing.assert_close(found, expected)


@grids
def test_invariants_do_not_change_and_there_are_as_many_as_orbits_of_features(group: Group, grid) -> None:
    tokens = GridTokens(group, grid)
    to_places = ReorderTokens(GridTokens(TRIVIAL, grid), tokens)
    x = features(2, tokens.num_tokens, 16)
    expected = tokens.invariants(tokens.to_irreps(to_places(x)))
    assert expected.shape == (2, tokens.num_tokens, 16 // group.order)
    average = torch.zeros_like(x)
    for g in group.elements:
        moved = act(group, g, x, grid)
        average += moved / group.order
        torch.testing.assert_close(tokens.invariants(tokens.to_irreps(to_places(moved))), expected)
    # They have the norm of the features' projection to invariants, so none is missing.
    assert expected.norm().item() == pytest.approx(average.norm().item())


@pytest.mark.parametrize("grid", [(2, 4), (3, 5), (4, 3), (5, 2)])
def test_with_c2_a_block_equals_the_flops_on_the_same_state_dict(grid: tuple[int, int]) -> None:
    tokens, columns = GridTokens(C2, grid), ColumnParity(grid)
    theirs, block = drawn(FlopResBlock(8, columns)), GroupResBlock(tokens, 8).double().eval()
    assert list(block.state_dict()) == list(theirs.state_dict())
    block.load_state_dict(theirs.state_dict())
    x = features(2, tokens.num_tokens, 8)
    expected = columns.to_raster(theirs(columns.from_raster(x)))
    torch.testing.assert_close(in_raster(block, tokens)(x), expected, atol=1e-12, rtol=1e-12)
    affine = drawn(BiparityAffine(8))
    ours = GroupGridAffine(tokens, 8).double()
    ours.load_state_dict(affine.state_dict())
    expected = columns.to_raster(columns.join(affine(columns.split(columns.from_raster(x)))))
    torch.testing.assert_close(in_raster(ours, tokens)(x), expected)
    places = ReorderTokens(GridTokens(TRIVIAL, grid), tokens)(x)
    invariant = columns.split(columns.from_raster(x)).invariant
    torch.testing.assert_close(tokens.invariants(tokens.to_irreps(places)), invariant)


@groups
def test_the_activation_acts_on_the_image(group: Group) -> None:
    tokens = GridTokens(group, (3, 3))
    mlp, x = GroupGridMlp(tokens, 16, 16), features(2, 9, 16)
    found = group.restrict(group.join(mlp.activate(group.split(x))), TRIVIAL)
    torch.testing.assert_close(found, quick_gelu(group.restrict(x, TRIVIAL)))


@groups
@pytest.mark.parametrize("constants", ["norm1.constants", "mlp_channels.fc1.constants"])
def test_one_wrong_sign_breaks_the_law(group: Group, constants: str) -> None:
    tokens, grid = GridTokens(group, (4, 4)), (4, 4)
    block, x = drawn(GroupResBlock(tokens, 16, init_values=0.5)), features(2, 16, 16)
    block.get_submodule(constants).table[0, -1] *= -1
    with pytest.raises(AssertionError):
        assert_commutes(in_raster(block, tokens), group, grid, x)


@pytest.mark.parametrize(("group", "blocks"), [(C2, ("l", "r")), (C2XC2, ("tr", "br")), (D4, ("br<", "br>"))])
def test_one_missing_butterfly_breaks_the_law(group: Group, blocks: tuple[str, str]) -> None:
    tokens, grid = GridTokens(group, (4, 4)), (4, 4)
    (tokens._pairs if blocks in tokens._pairs else tokens._transposed_pairs).remove(blocks)
    with pytest.raises(AssertionError):
        assert_commutes(in_raster(drawn(GroupTokenMixing(tokens)), tokens), group, grid, features(2, 16, 16))


@groups
def test_layers_that_are_called_and_layers_whose_weights_are_used_agree(group: Group, monkeypatch) -> None:
    tokens = GridTokens(group, (5, 5))
    block, x = drawn(GroupResBlock(tokens, 16, init_values=0.5)), features(2, 25, 16)
    calls = []
    for module in block.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: calls.append(1))
    called = block(x)
    assert len(calls) == 3 * len(group.irreps)
    monkeypatch.setattr("flopeq.layers.group.mixing.may_use_weights", lambda *_: True)
    torch.testing.assert_close(block(x), called)
    assert len(calls) == 3 * len(group.irreps)


@groups
def test_stochastic_depth_keeps_the_law(group: Group) -> None:
    tokens, grid = GridTokens(group, (3, 3)), (3, 3)
    block = drawn(GroupResBlock(tokens, 16, init_values=0.5, drop_path=0.5)).train()

    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return in_raster(block, tokens)(x)

    assert_commutes(seeded, group, grid, features(8, 9, 16))


@pytest.mark.parametrize(("group", "subgroup"), [(D4, C2XC2), (D4, C2), (D4, TRIVIAL), (C2XC2, C2), (C2XC2, TRIVIAL)])
@pytest.mark.parametrize("grid", [(4, 4), (5, 5)])
def test_restriction_keeps_the_features_and_commutes_with_the_subgroup(group, subgroup, grid) -> None:
    tokens, raster = GridTokens(group, grid), GridTokens(TRIVIAL, grid)
    restricted = GridTokens(subgroup, grid)
    x = features(2, tokens.num_tokens, 16)

    def restrict(x: Tensor) -> Tensor:
        return ReorderTokens(restricted, raster)(RestrictFeatures(tokens, restricted)(ReorderTokens(raster, tokens)(x)))

    torch.testing.assert_close(restrict(x), group.restrict(x, subgroup))
    for g in subgroup.elements:
        torch.testing.assert_close(restrict(act(group, g, x, grid)), act(subgroup, g, restrict(x), grid))


@pytest.mark.parametrize("grid", [(4, 4), (5, 5)])
@pytest.mark.parametrize("subgroup", [C2, C2XC2], ids=lambda group: group.name)
def test_token_mixing_and_mlp_of_d4_restrict_to_layers_of_the_subgroup(subgroup: Group, grid) -> None:
    """After the orthogonal change of basis they commute with the subgroup, so these layers are layers of it."""
    tokens = GridTokens(D4, grid)
    for name in ("token mixing", "mlp", "linear"):
        layer = in_raster(drawn(LAYERS[name](tokens)), tokens)

        def restricted(x: Tensor, layer=layer) -> Tensor:
            return D4.restrict(layer(D4.unrestrict(x, subgroup)), subgroup)

        assert_commutes(restricted, subgroup, grid, features(2, tokens.num_tokens, 16))


@pytest.mark.parametrize("group", [C2, C2XC2, D4], ids=lambda group: group.name)
def test_tables_survive_the_meta_device_and_have_the_precision_of_any_dtype(group: Group) -> None:
    tokens = GridTokens(group, (3, 3))
    with torch.device("meta"):
        constants, reorder = InvariantConstants(tokens), ReorderTokens(GridTokens(TRIVIAL, (3, 3)), tokens)
        assert group.join(constants([torch.ones(irrep.dim) for irrep in group.irreps])).device.type == "meta"
    for module in (constants, reorder):
        module.to_empty(device="cpu")
    assert torch.equal(constants.table, InvariantConstants(tokens).table)
    assert torch.equal(constants.double().table, tokens.patterns)
    assert reorder.table.tolist() == tokens.order


def test_what_the_layers_refuse() -> None:
    with pytest.raises(ValueError, match="grid 2 x 3 is not square"):
        GridTokens(D4, (2, 3))
    tokens = GridTokens(D4, (2, 2))
    with pytest.raises(ValueError, match="embed_dim is 12, .* 8 equal parts"):
        GroupGridAffine(tokens, 12)
    with pytest.raises(ValueError, match="out_features is 12, .* 8 equal parts"):
        GroupGridLinear(tokens, 16, 12)
