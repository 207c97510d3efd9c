"""The symmetries of the square: their action on images, their multiplication table, and the groups by name."""

from __future__ import annotations

import itertools

import pytest
import torch

from flopeq.square import FLIP, FLOP, IDENTITY, QUARTER_TURN, TRANSPOSE, TURN, Symmetry, generated_by, symmetry_group

D4 = symmetry_group("d4")


def test_the_named_symmetries_do_what_their_names_say():
    image = torch.arange(6).reshape(2, 3)
    assert torch.equal(IDENTITY(image), image)
    assert torch.equal(FLOP(image), torch.tensor([[2, 1, 0], [5, 4, 3]]))
    assert torch.equal(FLIP(image), torch.tensor([[3, 4, 5], [0, 1, 2]]))
    assert torch.equal(TURN(image), torch.tensor([[5, 4, 3], [2, 1, 0]]))
    assert torch.equal(QUARTER_TURN(image), torch.tensor([[2, 5], [1, 4], [0, 3]]))
    assert torch.equal(TRANSPOSE(image), image.T)


@pytest.mark.parametrize(("g", "h"), list(itertools.product(D4, D4)))
def test_composition_is_one_after_the_other(g: Symmetry, h: Symmetry):
    image = torch.arange(12).reshape(1, 3, 4)
    assert torch.equal((g @ h)(image), g(h(image)))


@pytest.mark.parametrize("g", D4)
def test_the_inverse_undoes_it(g: Symmetry):
    image = torch.arange(12).reshape(3, 4)
    assert torch.equal(g.inverse(g(image)), image)
    assert g @ g.inverse == IDENTITY
    assert (g(image).shape != image.shape) == g.swaps_axes


def test_it_acts_on_the_axes_that_are_named():
    grid = torch.arange(24).reshape(2, 3, 4)
    assert torch.equal(TRANSPOSE(grid, dims=(0, 1)), grid.transpose(0, 1))
    assert torch.equal(FLOP(grid, dims=(0, 1)), grid.flip(1))


def test_the_eight_symmetries_are_different():
    image = torch.arange(9).reshape(3, 3)
    assert len({tuple(g(image).flatten().tolist()) for g in D4}) == len({str(g) for g in D4}) == 8


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("trivial", {IDENTITY}),
        ("flop", {IDENTITY, FLOP}),
        ("flip", {IDENTITY, FLIP}),
        ("turn", {IDENTITY, TURN}),
        ("transpose", {IDENTITY, TRANSPOSE}),
        ("c4", {Symmetry(turns) for turns in range(4)}),
        ("flop*flip", {IDENTITY, FLOP, FLIP, TURN}),
        ("c4*flop", set(D4)),
        ("d4", {Symmetry(turns, mirrored) for turns in range(4) for mirrored in (False, True)}),
    ],
)
def test_groups_by_name(name: str, elements: set[Symmetry]):
    group = symmetry_group(name)
    assert group[0] == IDENTITY
    assert set(group) == elements
    assert set(generated_by(group)) == elements
    assert symmetry_group(reversed(group)) == group


def test_what_is_no_group_is_refused():
    with pytest.raises(ValueError, match="identity, flop, flip: not a group, .* half turn"):
        symmetry_group([IDENTITY, FLOP, FLIP])
    with pytest.raises(ValueError, match="'flopp' is unknown: use trivial, flop"):
        symmetry_group("flopp")
