"""Tokens of a grid in the basis of a group's irreps, for layers that mix tokens.

A group permutes the tokens of a grid, so these have irreps, as channels do. A few butterflies change from *places* to
irreps. Places are tokens sorted into blocks, such that a mirror swaps two blocks or leaves each token of a block where
it is. Blocks are named by their band of rows, top, middle or bottom, and of columns, left, middle or right. For D4 a
corner has its places above (`<`), below (`>`) and on (`=`) the diagonal in turn.

A feature has an irrep by its channel and one by its token. The products of equal irreps hold one invariant each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import product

import torch
from torch import Tensor, nn

from flopeq.groups import Group, Parts
from flopeq.irreps import SQRT_HALF, butterfly
from flopeq.layers.group.conv import check_square


class GridTokens:
    """The tokens of a grid: their order by places, and the orthogonal change between places and irreps.

    `order` has the raster index of each place. `multiplicities` counts the tokens of each irrep; small grids lack some.
    Raises: ValueError if the group transposes and the grid is not square.
    """

    def __init__(self, group: Group, grid_size: tuple[int, int]) -> None:
        check_square(group.name, "grid", grid_size)
        self.group, self.grid_size = group, grid_size
        blocks = {name: places for name, places in _blocks(group, grid_size).items() if places}
        self.order = [place for places in blocks.values() for place in places]
        self.num_tokens = len(self.order)
        self._names, self._sizes = list(blocks), {name: len(places) for name, places in blocks.items()}
        self._triangles: list[list[str]] = []
        if group.transposes and "tl" in blocks:
            side = grid_size[0] // 2
            self._sizes |= {f"{corner}{kind}": side * (side - 1) // 2 for corner in _TRIANGULAR for kind in "<>"}
            self._sizes |= {f"{corner}=": side for corner in _TRIANGULAR}
            self._triangles = [[corner, *(f"{corner}{kind}" for kind in "<>=")] for corner in _TRIANGULAR]
        self._pairs = _mirrored_pairs(group, self._names)
        self._transposed_pairs = [pair for pair in _TRANSPOSED if group.transposes and self._sizes.get(pair[0])]
        self._rows = [
            [[name for name in row if self._sizes.get(name)] for row in rows]
            for rows in _blocks_by_irrep(group, self._names)
        ]
        self.multiplicities = [sum(self._sizes[name] for name in rows[0]) for rows in self._rows]

    def to_irreps(self, x_BNC: Tensor) -> Parts:
        """Tokens by place -> a part for each irrep, (B, n, C), or (B, 2, n, C) for a two-dimensional one."""
        blocks = self._split(x_BNC, self._names)
        _apply_butterflies(blocks, self._pairs)
        for corner, *triangles in self._triangles:
            blocks |= self._split(blocks[corner], triangles)
        _apply_butterflies(blocks, self._transposed_pairs)
        parts = []
        for rows in self._rows:
            joined = [_cat([blocks[name] for name in row]) if row else x_BNC[:, :0] for row in rows]
            parts.append(joined[0] if len(rows) == 1 else torch.stack(joined, 1))
        return tuple(parts)

    def from_irreps(self, parts: Parts) -> Tensor:
        """The inverse of `to_irreps`."""
        blocks: dict[str, Tensor] = {}
        for rows, part in zip(self._rows, parts, strict=True):
            for index, row in enumerate(rows):
                blocks |= self._split(part if len(rows) == 1 else part[:, index], row)
        _apply_butterflies(blocks, self._transposed_pairs)
        for corner, *triangles in self._triangles:
            blocks[corner] = _cat([blocks[name] for name in triangles if name in blocks])
        _apply_butterflies(blocks, self._pairs[::-1])
        return _cat([blocks[name] for name in self._names])

    def _split(self, x_BNC: Tensor, names: list[str]) -> dict[str, Tensor]:
        blocks, start = {}, 0
        for name in names:
            blocks[name] = x_BNC[:, start : start + self._sizes[name]]
            start += self._sizes[name]
        return blocks

    @cached_property
    def patterns(self) -> Tensor:
        """Vectors of places, one for each row of each irrep: those that are 1 on all tokens of that row in irreps.

        Shape: (N, sum of dimensions), float64.
        """
        columns = []
        for index, irrep in enumerate(self.group.irreps):
            for row in range(irrep.dim):
                parts = [
                    torch.zeros(
                        (1, n, 1) if other.dim == 1 else (1, other.dim, n, 1), dtype=torch.float64, device="cpu"
                    )
                    for other, n in zip(self.group.irreps, self.multiplicities, strict=True)
                ]
                (parts[index] if irrep.dim == 1 else parts[index][:, row]).fill_(1)
                columns.append(self.from_irreps(tuple(parts))[0, :, 0])
        return torch.stack(columns, 1)

    def invariants(self, parts: Parts) -> Tensor:
        """The invariants of features whose channels and tokens are in irreps: the pairs of equal irreps, in order.

        That of two two-dimensional irreps is the trace of their 2 x 2 products, over sqrt 2. Its C/4 channels are
        counted as two tokens of C/|G| channels.

        Shape: parts of (B, N, C) -> (B, N, C/|G|).
        """
        found = []
        for index, (irrep, part) in enumerate(zip(self.group.irreps, parts, strict=True)):
            same = self.group.split(part)[index]
            if irrep.dim == 1:
                found.append(same)
            else:
                trace = SQRT_HALF * (same[:, 0, :, 0] + same[:, 1, :, 1])
                found.append(trace.unflatten(-1, (irrep.dim, -1)).movedim(2, 1).flatten(1, 2))
        return torch.cat(found, 1)


class FixedTable(nn.Module):
    """A module with a table that is no parameter and is not saved.

    The table is written anew whenever the module changes its device or dtype. So it has the precision of any dtype, and
    its values also after `to_empty`.
    """

    table: Tensor

    def __init__(self, shape: tuple[int, ...], device=None, dtype=None) -> None:
        super().__init__()
        self.register_buffer("table", torch.empty(shape, device=device, dtype=dtype), persistent=False)
        self.write_table()

    def values(self) -> Tensor:
        """The table's values, on the CPU."""
        raise NotImplementedError

    @torch.no_grad()
    def write_table(self) -> None:
        """Writes the values into the table."""
        self.table.copy_(self.values())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedTable:
        super()._apply(fn, recurse)
        self.write_table()
        return self


class InvariantConstants(FixedTable):
    """Constants on places that no symmetry changes: sum over the irreps of p_i b_i, for a vector b_i of each irrep.

    `b_i` has a value for each occurrence of the irrep i in the channels. On tokens in irreps the constant is the same
    for all tokens of that irrep, and acts where channel and token have the same irrep, and the same row. `p_i` is its
    pattern on the places. The layer has no parameters.

    Shape: vectors (M_i,) -> parts of (N, sum d_i M_i).
    """

    def __init__(self, tokens: GridTokens, device=None, dtype=None) -> None:
        self.tokens, self.dims = tokens, [irrep.dim for irrep in tokens.group.irreps]
        super().__init__((tokens.num_tokens, sum(self.dims)), device, dtype)

    def values(self) -> Tensor:
        return self.tokens.patterns

    def forward(self, vectors: Sequence[Tensor]) -> Parts:
        parts, start = [], 0
        for dim, vector in zip(self.dims, vectors, strict=True):
            pattern = self.table[:, start] if dim == 1 else self.table[:, start : start + dim]
            parts.append(pattern[..., None] * vector)
            start += dim
        return tuple(parts)

    def extra_repr(self) -> str:
        return f"{self.tokens.group.name}, grid={self.tokens.grid_size}"


class ReorderTokens(FixedTable):
    """Changes the order of tokens (B, N, C) from the places of one group to those of another on the same grid.

    The places of the trivial group are in raster order.
    """

    def __init__(self, source: GridTokens, target: GridTokens, device=None) -> None:
        self.source, self.target = source, target
        super().__init__((source.num_tokens,), device, torch.long)

    def values(self) -> Tensor:
        place_of = {token: place for place, token in enumerate(self.source.order)}
        return torch.tensor([place_of[token] for token in self.target.order], device="cpu")

    def forward(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.index_select(1, self.table)

    def extra_repr(self) -> str:
        return f"{self.source.group.name} -> {self.target.group.name}"


class RestrictFeatures(ReorderTokens):
    """Features of a group -> features of a subgroup, whose channels are in its irreps and tokens in its places.

    Shape: (B, N, C) -> (B, N, C).
    """

    def forward(self, x_BNC: Tensor) -> Tensor:
        return self.source.group.restrict(super().forward(x_BNC), self.target.group)


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1)


def _apply_butterflies(blocks: dict[str, Tensor], pairs: Iterable[tuple[str, str]]) -> None:
    for a, b in pairs:
        blocks[a], blocks[b] = butterfly(blocks[a], blocks[b])


def _bands(size: int, first: str, last: str) -> dict[str, list[int]]:
    """Rows or columns: the first half, the middle one if their number is odd, and the second half, mirrored."""
    half = size // 2
    return {first: list(range(half)), "m": list(range(half, size - half)), last: list(range(size))[::-1][:half]}


def _blocks(group: Group, grid_size: tuple[int, int]) -> dict[str, list[int]]:
    """The raster indices of each block of places, in an order such that mirrored tokens have the same position."""
    height, width = grid_size
    rows = _bands(height, "t", "b") if group.flips else {"": list(range(height))}
    columns = _bands(width, "l", "r") if group.order > 1 else {"": list(range(width))}
    blocks = {}
    for (row_name, band), (column_name, column_band) in product(rows.items(), columns.items()):
        places = {(i, j): row * width + column for i, row in enumerate(band) for j, column in enumerate(column_band)}
        name = row_name + column_name
        if group.transposes and "m" not in name:
            above = [(i, j) for i, j in places if i < j]
            order = above + [(j, i) for i, j in above] + [(i, j) for i, j in places if i == j]
            blocks[name] = [places[index] for index in order]
        else:
            blocks[name] = list(places.values())
    return blocks


_TRIANGULAR = ("tl", "br", "bl")
"""The corners of which D4 needs the places above, below and on the diagonal by themselves."""

_TRANSPOSED = (("tl<", "tl>"), ("br<", "br>"), ("ml", "tm"))
"""Blocks that the transposition swaps, after the butterflies of the flop and the flip."""


def _mirrored_pairs(group: Group, names: list[str]) -> list[tuple[str, str]]:
    """Blocks that the flop, and then the flip, swap."""
    pairs = [(name, name.replace("l", "r")) for name in names if "l" in name]
    return pairs + [(name, name.replace("t", "b")) for name in names if "t" in name and group.flips]


def _blocks_by_irrep(group: Group, names: list[str]) -> list[list[list[str]]]:
    """For each irrep and each of its rows, the blocks that hold it after the butterflies.

    The second block of a pair then holds what is odd under its mirror.
    """
    if group.transposes:
        a1, a2, b1, b2 = ["tl<", "tl=", "ml", "mm"], ["br>"], ["tl>", "tm"], ["br<", "br="]
        first_row, second_row = ["tr", "mr"], ["bl>", "bl<", "bl=", "bm"]
        return [[a1], [a2], [b1], [b2], [first_row, second_row]]
    if group.flips:
        return [
            [[name for name in names if ("r" in name, "b" in name) == parities]]
            for parities in ((False, False), (False, True), (True, False), (True, True))
        ]
    if group.order > 1:
        return [[[name for name in names if "r" not in name]], [[name for name in names if "r" in name]]]
    return [[names]]
