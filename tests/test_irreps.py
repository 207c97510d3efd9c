"""The algebra: actions of the group, and the change of basis between them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flopeq.irreps import change_basis, flop, flop_grid, flop_regular_grid, half, join, split
from flopeq.layers.biparity import ColumnParity

grids = st.tuples(st.integers(1, 5), st.integers(1, 6))


def features(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@given(st.integers(1, 9), st.integers(0, 3))
def test_change_of_basis_is_an_involution_that_keeps_norms(pairs: int, fixed: int) -> None:
    x = features(2, 2 * pairs + fixed)
    y = change_basis(x, fixed=fixed)
    torch.testing.assert_close(change_basis(y, fixed=fixed), x)
    torch.testing.assert_close(y.norm(), x.norm())


@given(st.integers(1, 9))
def test_the_flop_swaps_halves_in_the_regular_basis(pairs: int) -> None:
    x = features(3, 2 * pairs)
    left, right = split(change_basis(x))
    torch.testing.assert_close(change_basis(flop(x)), join(right, left))


def test_each_action_is_an_involution_and_not_trivial() -> None:
    x = features(2, 4, 3, 5)
    for action in (flop_grid, flop_regular_grid):
        torch.testing.assert_close(action(action(x)), x)
        assert not torch.allclose(action(x), x)


@given(grids)
def test_columns_by_parity_and_raster_order_are_inverse(grid: tuple[int, int]) -> None:
    columns = ColumnParity(grid)
    x = features(2, grid[0] * grid[1], 4)
    torch.testing.assert_close(columns.to_raster(columns.from_raster(x)), x)
    torch.testing.assert_close(columns.join(columns.split(x)), x)


@given(grids)
def test_the_flop_negates_odd_columns(grid: tuple[int, int]) -> None:
    height, width = grid
    columns = ColumnParity(grid)
    x = features(1, height * width, 2)
    mirrored = x.unflatten(1, grid).flip(2).flatten(1, 2)
    sign = torch.ones(height * width, 1, dtype=torch.float64)
    sign[columns.num_even :] = -1
    torch.testing.assert_close(columns.from_raster(mirrored), sign * columns.from_raster(x))


def test_an_odd_width_does_not_split() -> None:
    with pytest.raises(ValueError, match="embed_dim is 7.*even number"):
        half(7, "embed_dim")
