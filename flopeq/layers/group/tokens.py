"""Tokens of a grid in the basis of a group's irreps, for layers that mix tokens.

A group permutes the tokens of a grid, so these have irreps, as channels do. A few butterflies change from *places* to
irreps. Places are tokens sorted into blocks, such that a mirror swaps two blocks or leaves each token of a block where
it is. Blocks are named by their band of rows, top, middle or bottom, and of columns, left, middle or right. D4 also
splits the corners in tokens above (`<`), below (`>`) and on (`=`) the diagonal.

A feature has an irrep by its channel and one by its token. The products of equal irreps hold one invariant each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

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
        self._sizes = {name: len(places) for name, places in blocks.items()}
        self._pairs = [pair for pair in _mirrored_pairs(group, list(blocks)) if set(pair) <= set(blocks)]
        self._rows = [
            [[name for name in row if name in blocks] for row in rows] for rows in _blocks_by_irrep(group, list(blocks))
        ]
        self.multiplicities = [sum(self._sizes[name] for name in rows[0]) for rows in self._rows]

    def to_irreps(self, x_BNC: Tensor) -> Parts:
        """Tokens by place -> a part for each irrep, (B, n, C), or (B, 2, n, C) for a two-dimensional one."""
        blocks, start = {}, 0
        for name, size in self._sizes.items():
            blocks[name] = x_BNC[:, start : start + size]
            start += size
        for a, b in self._pairs:
            blocks[a], blocks[b] = butterfly(blocks[a], blocks[b])
        parts = []
        for rows in self._rows:
            joined = [_cat([blocks[name] for name in row]) if row else x_BNC[:, :0] for row in rows]
            parts.append(joined[0] if len(rows) == 1 else torch.stack(joined, 1))
        return tuple(parts)

    def from_irreps(self, parts: Parts) -> Tensor:
        """The inverse of `to_irreps`."""
        blocks = {}
        for rows, part in zip(self._rows, parts, strict=True):
            for index, row in enumerate(rows):
                joined, start = part if len(rows) == 1 else part[:, index], 0
                for name in row:
                    blocks[name] = joined[:, start : start + self._sizes[name]]
                    start += self._sizes[name]
        for a, b in reversed(self._pairs):
            blocks[a], blocks[b] = butterfly(blocks[a], blocks[b])
        return _cat([blocks[name] for name in self._sizes])

    @cached_property
    def signed_squares(self) -> Tensor:
        """Constants on places, one for each row of each irrep: those that are 1 on all tokens of that row in irreps.

        (N, sum of dimensions), float64. The values are squared and keep their sign.
        """
        columns = []
        for index, irrep in enumerate(self.group.irreps):
            for row in range(irrep.dim):
                parts = [
                    torch.zeros((1, n, 1) if other.dim == 1 else (1, other.dim, n, 1), dtype=torch.float64, device="cpu")
                    for other, n in zip(self.group.irreps, self.multiplicities, strict=True)
                ]
                (parts[index] if irrep.dim == 1 else parts[index][:, row]).fill_(1)
                columns.append(self.from_irreps(tuple(parts))[0, :, 0])
        values = torch.stack(columns, 1)
        return (values * values.abs() * self.group.order).round() / self.group.order

    def invariants(self, parts: Parts) -> Tensor:
        """The invariants of features whose channels and tokens are in irreps: the pairs of equal irreps, in their order.

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


class InvariantConstants(nn.Module):
    """Constants on places that no symmetry changes: sum over the irreps of p_i b_i, for a vector b_i of each irrep.

    `b_i` has a value for each occurrence of the irrep i in the channels. On tokens in irreps it is the same for all
    tokens of that irrep, and acts where channel and token have the same irrep, and the same row. `p_i` has the tokens'
    places. The layer has no parameters.

    Shape: vectors (M_i,) -> parts of (N, sum d_i M_i).
    """

    signed_squares: Tensor

    def __init__(self, tokens: GridTokens, device=None, dtype=None) -> None:
        super().__init__()
        self.tokens, self.dims = tokens, [irrep.dim for irrep in tokens.group.irreps]
        # Squares of the values are powers of two, which every dtype represents exactly.
        shape = tokens.num_tokens, sum(self.dims)
        self.register_buffer("signed_squares", torch.empty(shape, device=device, dtype=dtype), persistent=False)
        self.reset_tables()

    @torch.no_grad()
    def reset_tables(self) -> None:
        """Writes the table again, for a module that was created on the meta device."""
        self.signed_squares.copy_(self.tokens.signed_squares)

    def forward(self, vectors: Sequence[Tensor]) -> Parts:
        patterns = self.signed_squares.sign() * self.signed_squares.abs().sqrt()
        parts, start = [], 0
        for dim, vector in zip(self.dims, vectors, strict=True):
            pattern = patterns[:, start] if dim == 1 else patterns[:, start : start + dim]
            parts.append(pattern[..., None] * vector)
            start += dim
        return tuple(parts)

    def extra_repr(self) -> str:
        return f"{self.tokens.group.name}, grid={self.tokens.grid_size}"


class ReorderTokens(nn.Module):
    """Changes the order of tokens (B, N, C) from the places of one group to those of another on the same grid.

    The places of the trivial group are in raster order.
    """

    index: Tensor

    def __init__(self, source: GridTokens, target: GridTokens, device=None) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.register_buffer("index", torch.empty(source.num_tokens, dtype=torch.long, device=device), persistent=False)
        self.reset_tables()

    @torch.no_grad()
    def reset_tables(self) -> None:
        """Writes the table again, for a module that was created on the meta device."""
        place_of = {token: place for place, token in enumerate(self.source.order)}
        self.index.copy_(torch.tensor([place_of[token] for token in self.target.order], device="cpu"))

    def forward(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.index_select(1, self.index)

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


def _bands(size: int, first: str, last: str) -> dict[str, list[int]]:
    """Rows or columns: the first half, the middle one if their number is odd, and the second half, mirrored."""
    places = list(range(size))
    half = size // 2
    return {first: places[:half], "m": places[half : size - half], last: places[: size - half - 1 : -1] if half else []}


def _blocks(group: Group, grid_size: tuple[int, int]) -> dict[str, list[int]]:
    """The raster indices of each block of places, in an order such that mirrored tokens have the same position."""
    height, width = grid_size
    rows = _bands(height, "t", "b") if group.flips else {"": list(range(height))}
    columns = _bands(width, "l", "r") if group.order > 1 else {"": list(range(width))}
    blocks = {}
    for row_name, band in rows.items():
        for column_name, column_band in columns.items():
            name = row_name + column_name
            places = {(i, j): row * width + column for i, row in enumerate(band) for j, column in enumerate(column_band)}
            if group.transposes and "m" not in name:
                blocks[name + "<"] = [places[i, j] for i, j in places if i < j]
                blocks[name + ">"] = [places[j, i] for i, j in places if i < j]
                blocks[name + "="] = [places[i, j] for i, j in places if i == j]
            else:
                blocks[name] = list(places.values())
    return blocks


def _mirrored_pairs(group: Group, names: list[str]) -> list[tuple[str, str]]:
    """Blocks that the flop, then the flip, and then the transposition swap, if they are the first ones of their pair."""
    pairs = [(name, name.replace("l", "r")) for name in names if "l" in name]
    if group.flips:
        pairs += [(name, name.replace("t", "b")) for name in names if "t" in name]
    if group.transposes:
        pairs += [("tl<", "tl>"), ("br<", "br>"), ("ml", "tm")]
    return pairs


def _blocks_by_irrep(group: Group, names: list[str]) -> list[list[list[str]]]:
    """For each irrep and each of its rows, the blocks that hold it after the butterflies.

    The second block of a pair then holds what is odd under its mirror.
    """
    if group.transposes:
        a1, a2, b1, b2 = ["tl<", "tl=", "ml", "mm"], ["br>"], ["tl>", "tm"], ["br<", "br="]
        first_row, second_row = ["tr<", "tr>", "tr=", "mr"], ["bl>", "bl<", "bl=", "bm"]
        return [[a1], [a2], [b1], [b2], [first_row, second_row]]
    if group.flips:
        return [
            [[name for name in names if ("r" in name, "b" in name) == parities]]
            for parities in ((False, False), (False, True), (True, False), (True, True))
        ]
    if group.order > 1:
        return [[[name for name in names if "r" not in name]], [[name for name in names if "r" in name]]]
    return [[names]]
