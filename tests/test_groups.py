"""The groups of the square: representations, the regular basis, and the restriction to subgroups."""

import copy
import pickle
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from flopeq.groups import C2, C2XC2, D4, GROUPS, TRIVIAL, Group, group_named
from flopeq.irreps import change_basis, flop, flop_grid, flop_regular_grid
from flopeq.square import FLIP, FLOP, TRANSPOSE, symmetry_group

groups = pytest.mark.parametrize("group", [C2, C2XC2, D4], ids=lambda group: group.name)

CHAIN = [D4, C2XC2, C2, TRIVIAL]

RESTRICTIONS = [(group, subgroup) for i, group in enumerate(CHAIN) for subgroup in CHAIN[i:]]

SIZE = (2, 16, 5, 5)


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("group", "elements", "irreps"),
    [
        (C2, "flop", {"even": 1, "odd": 1}),
        (C2XC2, "flop*flip", {"ee": 1, "eo": 1, "oe": 1, "oo": 1}),
        (D4, "d4", {"a1": 1, "a2": 1, "b1": 1, "b2": 1, "e": 2}),
    ],
    ids=["c2", "c2xc2", "d4"],
)
def test_irreps_fill_the_group(group: Group, elements: str, irreps: dict[str, int]) -> None:
    assert group.elements == symmetry_group(elements)
    assert {irrep.name: irrep.dim for irrep in group.irreps} == irreps
    assert sum(dim**2 for dim in irreps.values()) == group.order == len(group.elements)


@groups
def test_irreps_are_homomorphisms_with_orthogonal_characters(group: Group) -> None:
    for irrep, g, h in product(group.irreps, group.elements, group.elements):
        a, b, ab = (torch.tensor(irrep.matrices[s]) for s in (g, h, g @ h))
        assert torch.equal(a @ b, ab)
        assert torch.equal(a @ a.T, torch.eye(irrep.dim, dtype=a.dtype))
    characters = torch.tensor([[sum(row[i] for i, row in enumerate(irrep.matrices[g])) for g in group.elements]
                               for irrep in group.irreps])  # fmt: skip
    assert torch.equal(characters @ characters.T, group.order * torch.eye(len(group.irreps), dtype=characters.dtype))


def test_signs_and_rows_are_as_documented() -> None:
    x = features(8)
    a1, a2, b1, b2, e = D4.split(x)
    assert torch.equal(D4.act(FLOP, x), D4.join((a1, -a2, b1, -b2, e * torch.tensor([[-1.0], [1.0]]))))
    assert torch.equal(D4.act(TRANSPOSE, x), D4.join((a1, -a2, -b1, b2, e.flip(-2))))
    ee, eo, oe, oo = C2XC2.split(x)
    assert torch.equal(C2XC2.act(FLOP, x), C2XC2.join((ee, eo, -oe, -oo)))
    assert torch.equal(C2XC2.act(FLIP, x), C2XC2.join((ee, -eo, oe, -oo)))


def test_c2_is_that_of_irreps() -> None:
    x = features(*SIZE)
    assert torch.equal(C2.act(FLOP, x.movedim(1, -1)), flop(x, 1).movedim(1, -1))
    assert torch.equal(C2.act_on_grid(FLOP, x), flop_grid(x))
    assert torch.equal(C2.restrict(x.movedim(1, -1), TRIVIAL), change_basis(x, 1).movedim(1, -1))
    torch.testing.assert_close(C2.act_on_grid(FLOP, x, TRIVIAL), flop_regular_grid(x))


@groups
def test_split_and_join_are_inverse_and_parts_have_their_shapes(group: Group) -> None:
    x = features(3, 16)
    parts = group.split(x)
    assert torch.equal(group.join(parts), x)
    shapes = {"c2": [(3, 8)] * 2, "c2xc2": [(3, 4)] * 4, "d4": [(3, 2)] * 4 + [(3, 2, 4)]}
    assert [part.shape for part in parts] == shapes[group.name]


@groups
def test_the_regular_basis_is_orthogonal_and_permuted_by_the_group(group: Group) -> None:
    matrix = group.fourier_matrix(16)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(16, dtype=torch.float64))
    x = features(16)
    regular = group.to_regular(group.split(x))
    torch.testing.assert_close(matrix @ torch.cat(regular), x)
    torch.testing.assert_close(group.join(group.from_regular(regular)), x)
    permutations = set()
    for g in group.elements:
        permutation = matrix.T @ group.act(g, matrix.T).T  # acts on the irreps of each regular basis vector
        torch.testing.assert_close(permutation, permutation.round())
        blocks = permutation.round().unflatten(0, (group.order, -1)).unflatten(2, (group.order, -1))
        moved = blocks[:, 0, :, 0]
        assert torch.equal(permutation.round(), torch.kron(moved, torch.eye(16 // group.order, dtype=moved.dtype)))
        assert torch.equal(moved.sum(0), torch.ones(group.order, dtype=moved.dtype)) and moved.min() == 0
        permutations.add(tuple(moved.argmax(0).tolist()))
    assert len(permutations) == group.order
    assert {moved[0] for moved in permutations} == set(range(group.order)), "one orbit, as the regular basis has"


@pytest.mark.parametrize(("group", "subgroup"), RESTRICTIONS, ids=lambda group: group.name)
def test_restriction_is_orthogonal_and_commutes_with_the_subgroup(group: Group, subgroup: Group) -> None:
    x = features(*SIZE)
    channels_last = x.movedim(1, -1)
    y = group.restrict(channels_last, subgroup)
    torch.testing.assert_close(group.unrestrict(y, subgroup), channels_last)
    torch.testing.assert_close(y.square().sum(-1), channels_last.square().sum(-1))
    for g in subgroup.elements:
        acted = group.restrict(group.act_on_grid(g, x).movedim(1, -1), subgroup).movedim(-1, 1)
        torch.testing.assert_close(acted, subgroup.act_on_grid(g, y.movedim(-1, 1)))
    for g in group.elements:
        acted = group.restrict(group.act_on_grid(g, x).movedim(1, -1), subgroup).movedim(-1, 1)
        torch.testing.assert_close(acted, group.act_on_grid(g, y.movedim(-1, 1), restricted_to=subgroup))


def test_restriction_goes_step_by_step() -> None:
    x = features(3, 16)
    for middle, last in pairwise(CHAIN[1:]):
        assert torch.equal(middle.restrict(D4.restrict(x, middle), last), D4.restrict(x, last))


def test_what_the_groups_refuse() -> None:
    with pytest.raises(ValueError, match="embed_dim is 12, .* 8 equal parts.*multiple of 8"):
        D4.multiplicity(12, "embed_dim")
    with pytest.raises(ValueError, match="c2 do not restrict to d4"):
        C2.restrict(features(3, 16), D4)
    with pytest.raises(ValueError, match="'d5' is unknown: use trivial, c2, c2xc2, d4"):
        group_named("d5")


def test_copies_of_a_group_are_the_group() -> None:
    for group in GROUPS.values():
        assert copy.deepcopy(group) is group and pickle.loads(pickle.dumps(group)) is group
    assert [group.flips for group in CHAIN] == [True, True, False, False]
    assert [group.transposes for group in CHAIN] == [True, False, False, False]
