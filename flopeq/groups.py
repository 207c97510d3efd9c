"""Representations of the groups of the square: C2 = {1, flop}, C2 x C2 (flop and flip), and D4, all eight symmetries.

Features are kept in the basis of irreps, as `flopeq.irreps` describes for C2. Their channels are in the order of the
group's irreps. An irrep of dimension d takes d^2 of every |G| channels. It is a *part* (..., C/|G|) of the features if
d = 1. D4's two-dimensional irrep, `e`, is a part (..., 2, C/4): two *rows*, which the group mixes as it mixes the
coordinates (column, row) of a point. It is the last part.

Every group but the trivial one has a subgroup of half its size: D4 > C2 x C2 > C2 > 1. Features of the group are two
*copies* of features of the subgroup, after butterflies. The whole chain gives the *regular* basis, where a
symmetry permutes |G| equal parts. See docs/maths.md, and Bökman et al. 2025, section 3, for C2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from flopeq.irreps import butterfly
from flopeq.square import FLIP, FLOP, IDENTITY, TRANSPOSE, Symmetry, generated_by

Parts = tuple[Tensor, ...]
"""Features as separate tensors, one for each irrep."""

Matrix = tuple[tuple[int, ...], ...]


class Irrep:
    """An irreducible representation: its name, its dimension, and each symmetry's matrix of entries 0, 1 and -1."""

    def __init__(self, name: str, matrices: dict[Symmetry, Matrix]) -> None:
        self.name, self.matrices = name, matrices
        self.dim = len(matrices[IDENTITY])

    def act(self, g: Symmetry, part: Tensor) -> Tensor:
        """The action on a part of the features, (..., C/|G|), or (..., 2, C/4)."""
        if self.dim == 1:
            return self.matrices[g][0][0] * part
        matrix = part.new_tensor(self.matrices[g])
        return torch.einsum("ij,...jc->...ic", matrix, part)


class Group:
    """A group of symmetries with its irreps, the action on features, and the change to features of its subgroup.

    `mirrors` generate the group, and `irreps` has the matrices of the mirrors. `to_copies` turns parts into two copies
    of parts of `subgroup`, and `from_copies` is its inverse.
    """

    def __init__(
        self,
        name: str,
        mirrors: tuple[Symmetry, ...],
        irreps: dict[str, tuple[Matrix, ...]],
        subgroup: Group | None = None,
        to_copies: Callable[..., tuple[Parts, Parts]] | None = None,
        from_copies: Callable[[Parts, Parts], Parts] | None = None,
    ) -> None:
        self.name, self.mirrors, self.subgroup = name, mirrors, subgroup
        self.to_copies, self.from_copies = to_copies, from_copies
        self.elements = generated_by(mirrors)
        self.order = len(self.elements)
        self.irreps = tuple(
            Irrep(key, _all_matrices(dict(zip(mirrors, given, strict=True)))) for key, given in irreps.items()
        )

    def __repr__(self) -> str:
        return f"<Group {self.name}>"

    def __reduce__(self) -> tuple[Callable[[str], Group], tuple[str]]:
        return group_named, (self.name,)

    @property
    def flips(self) -> bool:
        """Whether the group has a symmetry that mirrors an image vertically."""
        return FLIP in self.elements

    @property
    def transposes(self) -> bool:
        """Whether the group has a symmetry that swaps rows and columns, so that it acts on square images only."""
        return any(g.swaps_axes for g in self.elements)

    def multiplicity(self, width: int, what: str) -> int:
        """width/|G|, the channels of a one-dimensional irrep. Raises ValueError if width is not a multiple of |G|."""
        if width % self.order:
            raise ValueError(
                f"{what} is {width}, which does not split into {self.order} equal parts, one for each symmetry of "
                f"{self.name}: use a multiple of {self.order}"
            )
        return width // self.order

    def split(self, x: Tensor) -> Parts:
        """The parts of features (..., C)."""
        parts, start, copies = [], 0, x.shape[-1] // self.order
        for irrep in self.irreps:
            channels = irrep.dim**2 * copies
            part = x[..., start : start + channels]
            parts.append(part if irrep.dim == 1 else part.unflatten(-1, (irrep.dim, irrep.dim * copies)))
            start += channels
        return tuple(parts)

    def join(self, parts: Parts) -> Tensor:
        """The inverse of `split`."""
        flat = [part if irrep.dim == 1 else part.flatten(-2) for irrep, part in zip(self.irreps, parts, strict=True)]
        return torch.cat(flat, -1)

    def to_regular(self, parts: Parts) -> list[Tensor]:
        """The |G| parts (..., C/|G|) in the regular basis."""
        return [part for (part,) in self._copies(parts, TRIVIAL)]

    def from_regular(self, regular: Sequence[Tensor]) -> Parts:
        """The inverse of `to_regular`."""
        return self._merged([(part,) for part in regular], TRIVIAL)

    def restrict(self, x: Tensor, subgroup: Group) -> Tensor:
        """Features of a subgroup, by a fixed orthogonal change of channels. The trivial group gives the regular basis.

        Shape: (..., C) -> the same.
        Raises: ValueError if the groups that follow this one in the chain do not include `subgroup`.
        """
        copies = self._copies(self.split(x), subgroup)
        return subgroup.join(tuple(torch.cat(parts, -1) for parts in zip(*copies, strict=True)))

    def unrestrict(self, x: Tensor, subgroup: Group) -> Tensor:
        """The inverse of `restrict`."""
        number = self.order // subgroup.order
        chunks = [part.chunk(number, -1) for part in subgroup.split(x)]
        return self.join(self._merged(list(zip(*chunks, strict=True)), subgroup))

    def fourier_matrix(self, num_channels: int) -> Tensor:
        """The orthogonal matrix (C, C) that maps the regular basis to irreps, in float64."""
        self.multiplicity(num_channels, "num_channels")
        return self.restrict(torch.eye(num_channels, dtype=torch.float64), TRIVIAL)

    def act(self, g: Symmetry, x: Tensor) -> Tensor:
        """The action of a symmetry on vectors of irreps (..., C)."""
        return self.join(tuple(irrep.act(g, part) for irrep, part in zip(self.irreps, self.split(x), strict=True)))

    def act_on_grid(self, g: Symmetry, x_BCHW: Tensor, restricted_to: Group | None = None) -> Tensor:
        """The action on a grid of irreps: moves the positions, and acts on the channels.

        `restricted_to` names the subgroup if the features were restricted; the trivial group is for the regular basis.
        """
        x_BHWC = g(x_BCHW).movedim(1, -1)
        if restricted_to is None:
            return self.act(g, x_BHWC).movedim(-1, 1)
        acted = self.act(g, self.unrestrict(x_BHWC, restricted_to))
        return self.restrict(acted, restricted_to).movedim(-1, 1)

    def contains(self, subgroup: Group) -> bool:
        """Whether `subgroup` is this group or follows it in the chain of subgroups."""
        return subgroup is self or (self.subgroup is not None and self.subgroup.contains(subgroup))

    def _chain(self, subgroup: Group) -> list[Group]:
        """The groups from this one to the one above `subgroup`."""
        if not self.contains(subgroup):
            raise ValueError(f"features of {self.name} do not restrict to {subgroup.name}, which is no subgroup of it")
        chain, group = [], self
        while group is not subgroup:
            chain.append(group)
            assert group.subgroup is not None
            group = group.subgroup
        return chain

    def _copies(self, parts: Parts, subgroup: Group) -> list[Parts]:
        copies = [parts]
        for group in self._chain(subgroup):
            assert group.to_copies is not None
            pairs = [group.to_copies(*parts) for parts in copies]
            copies = [first for first, _ in pairs] + [second for _, second in pairs]
        return copies

    def _merged(self, copies: list[Parts], subgroup: Group) -> Parts:
        for group in reversed(self._chain(subgroup)):
            assert group.from_copies is not None
            number = len(copies) // 2
            copies = [group.from_copies(*pair) for pair in zip(copies[:number], copies[number:], strict=True)]
        return copies[0]


def _all_matrices(mirrors: dict[Symmetry, Matrix]) -> dict[Symmetry, Matrix]:
    """The matrices of all compositions of the mirrors, and of the identity."""
    dim = len(next(iter(mirrors.values()))) if mirrors else 1
    found = {IDENTITY: tuple(tuple(int(i == j) for j in range(dim)) for i in range(dim))}
    while True:
        more = {
            g @ h: _product(a, b) for (g, a), (h, b) in product(mirrors.items(), found.items()) if g @ h not in found
        }
        if not more:
            return found
        found |= more


def _product(a: Matrix, b: Matrix) -> Matrix:
    return tuple(
        tuple(sum(x * y for x, y in zip(row, column, strict=True)) for column in zip(*b, strict=True)) for row in a
    )


def _butterflies(first: Parts, second: Parts) -> Parts:
    """The butterfly of each part of the first with the same part of the second, one after the other."""
    return tuple(part for pair in zip(first, second, strict=True) for part in butterfly(*pair))


def _c2_copies(even: Tensor, odd: Tensor) -> tuple[Parts, Parts]:
    left, right = butterfly(even, odd)
    return (left,), (right,)


def _c2xc2_copies(ee: Tensor, eo: Tensor, oe: Tensor, oo: Tensor) -> tuple[Parts, Parts]:
    (top_even, bottom_even), (top_odd, bottom_odd) = butterfly(ee, eo), butterfly(oe, oo)
    return (top_even, top_odd), (bottom_even, bottom_odd)


def _d4_copies(a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor, e: Tensor) -> tuple[Parts, Parts]:
    (ee, ee_turned), (oo, oo_turned) = butterfly(a1, b1), butterfly(b2, a2)
    first_row, second_row = e.unbind(-2)
    oe, oe_turned = first_row.chunk(2, -1)
    eo_turned, eo = second_row.chunk(2, -1)
    return (ee, eo, oe, oo), (ee_turned, eo_turned, oe_turned, oo_turned)


def _d4_from_copies(copy: Parts, turned: Parts) -> Parts:
    (ee, eo, oe, oo), (ee_turned, eo_turned, oe_turned, oo_turned) = copy, turned
    (a1, b1), (b2, a2) = butterfly(ee, ee_turned), butterfly(oo, oo_turned)
    # One concatenation of all quarters compiles into no copy. Stacking two rows compiles into a copy of each.
    e = torch.cat((oe, oe_turned, eo_turned, eo), -1)
    return a1, a2, b1, b2, e.unflatten(-1, (2, 2 * oe.shape[-1]))


_PLUS, _MINUS = ((1,),), ((-1,),)

TRIVIAL = Group("trivial", (), {"all": ()})
"""The group of ordinary layers, which has one irrep with all channels."""

C2 = Group(
    "c2", (FLOP,), {"even": (_PLUS,), "odd": (_MINUS,)}, TRIVIAL, _c2_copies, _butterflies
)  # fmt: skip
"""The flop."""

C2XC2 = Group(
    "c2xc2",
    (FLOP, FLIP),
    {"ee": (_PLUS, _PLUS), "eo": (_PLUS, _MINUS), "oe": (_MINUS, _PLUS), "oo": (_MINUS, _MINUS)},
    C2,
    _c2xc2_copies,
    _butterflies,
)
"""Flop and flip. The first letter is the parity along columns (under the flop), the second along rows (the flip)."""

D4 = Group(
    "d4",
    (FLOP, TRANSPOSE),
    {
        "a1": (_PLUS, _PLUS),
        "a2": (_MINUS, _MINUS),
        "b1": (_PLUS, _MINUS),
        "b2": (_MINUS, _PLUS),
        "e": (((-1, 0), (0, 1)), ((0, 1), (1, 0))),
    },
    C2XC2,
    _d4_copies,
    _d4_from_copies,
)
"""All symmetries of the square. The first row of `e` is odd along columns, the second, its transpose, along rows."""

GROUPS = {group.name: group for group in (TRIVIAL, C2, C2XC2, D4)}


def group_named(name: str) -> Group:
    """The group of that name. Raises: ValueError for an unknown name."""
    if name not in GROUPS:
        raise ValueError(f"group {name!r} is unknown: use {', '.join(GROUPS)}")
    return GROUPS[name]
