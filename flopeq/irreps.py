"""Representations of the group C2 = {1, flop}, which mirrors images horizontally.

Features are kept in the basis of irreps: along an axis the first half is *even* (trivial irrep, the flop leaves it
alone), the second half *odd* (sign irrep, the flop negates it). In the *regular* basis the flop swaps the halves.
See Bökman et al. 2025 ("Flopping for FLOPs"), section 3 and appendix A.
"""

from __future__ import annotations

import torch
from torch import Tensor

SQRT_HALF = 0.5**0.5


def half(width: int, what: str) -> int:
    """Half of a width. Raises ValueError when there is none, because even and odd parts must be equally wide."""
    if width % 2:
        raise ValueError(f"{what} is {width}, which does not split into an even and an odd half: use an even number")
    return width // 2


def split(x: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """The even and the odd half along an axis."""
    even, odd = x.chunk(2, dim)
    return even, odd


def join(even: Tensor, odd: Tensor, dim: int = -1) -> Tensor:
    """The inverse of `split`."""
    return torch.cat((even, odd), dim)


def butterfly(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(a + b)/sqrt 2 and (a - b)/sqrt 2: irreps to regular basis for two halves, and back (sec. 3.3, eq. 3)."""
    return SQRT_HALF * (a + b), SQRT_HALF * (a - b)


def change_basis(x: Tensor, dim: int = -1, fixed: int = 0) -> Tensor:
    """(a, m, b) -> ((a + b)/sqrt 2, m, (a - b)/sqrt 2): the same along an axis; its own inverse.

    The `fixed` entries in the middle of the axis are those that the flop maps to themselves, such as the middle
    column of a grid with an odd number of columns (appendix C).

    Shape: any -> the same.
    """
    pairs = (x.shape[dim] - fixed) // 2
    a, middle, b = x.split([pairs, fixed, pairs], dim)
    total, difference = butterfly(a, b)
    return torch.cat((total, middle, difference) if fixed else (total, difference), dim)


def flop(x: Tensor, dim: int = -1) -> Tensor:
    """The group's action on a vector of irreps: (even, odd) -> (even, -odd)."""
    even, odd = split(x, dim)
    return join(even, -odd, dim)


def flop_grid(x_BCHW: Tensor) -> Tensor:
    """The group's action on a grid of irreps: columns are mirrored, odd channels negated."""
    return flop(x_BCHW.flip(-1), dim=1)


def flop_regular_grid(x_BCHW: Tensor) -> Tensor:
    """The group's action on a grid of features in the regular basis: columns are mirrored, halves swapped."""
    left, right = split(x_BCHW.flip(-1), dim=1)
    return join(right, left, dim=1)
