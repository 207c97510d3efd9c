"""Fields on a grid that a group's irreps prescribe, such as patch kernels and position embeddings, from free values.

A field of an irrep rho gives a vector of d rows at every position, and obeys k(g p) = rho(g) k(p). Its entries, one for
each row and position, fall into orbits. Since rho only permutes rows and changes signs, all entries of an orbit are one
free value with signs, or zero if a symmetry maps an entry to its negative. For the flop these are symmetric and
antisymmetric fields, given by their left part.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flopeq.groups import Group, Irrep


class OrbitTable(NamedTuple):
    """Which free value, with which sign, each entry of a field has. Entries are ordered by row, then in raster order.

    `index` and `sign` have d*H*W entries. Entries that are zero have the index `len(representatives)`.
    `representatives` are the first entries of the orbits, in ascending order: free values are stored in this order.
    """

    index: tuple[int, ...]
    sign: tuple[int, ...]
    representatives: tuple[int, ...]


@lru_cache(maxsize=256)
def orbit_table(group: Group, irrep: Irrep, size: tuple[int, int]) -> OrbitTable:
    """The table of an irrep's fields on a grid (H, W). The grid must be square if the group transposes."""
    num_positions = size[0] * size[1]
    positions = torch.arange(num_positions, device="cpu").view(size)
    moves = []
    for g in group.elements:
        moved_back = g(positions).flatten().tolist()  # the position that g maps to each position
        moves.append((irrep.matrices[g], moved_back))

    first_entry, signs = [], []
    for row in range(irrep.dim):
        for position in range(num_positions):
            entry = row * num_positions + position
            # k_i(g^-1 p) = sum_j rho(g)_ji k_j(p), where the sum has one term.
            images = [
                (i * num_positions + moved_back[position], sign)
                for matrix, moved_back in moves
                for i, sign in enumerate(matrix[row])
                if sign
            ]
            first = min(images)
            first_entry.append(None if (entry, -1) in images else first[0])
            signs.append(first[1])
    representatives = sorted({first for first in first_entry if first is not None})
    order = {first: number for number, first in enumerate(representatives)}
    index = tuple(len(order) if first is None else order[first] for first in first_entry)
    return OrbitTable(index, tuple(signs), tuple(representatives))


def size_of_fields(group: Group, num_free: tuple[int, ...]) -> tuple[int, int]:
    """The grid (H, W) whose fields have these numbers of free values, by irrep; of several, the most nearly square.

    Raises: ValueError if there is none.
    """
    num_positions = sum(irrep.dim * free for irrep, free in zip(group.irreps, num_free, strict=True))
    heights = [height for height in range(1, num_positions + 1) if num_positions % height == 0]
    for height in sorted(heights, key=lambda height: abs(height - num_positions // height)):
        size = height, num_positions // height
        if group.transposes and size[0] != size[1]:
            continue
        if num_free == tuple(len(orbit_table(group, irrep, size).representatives) for irrep in group.irreps):
            return size
    raise ValueError(f"no grid has fields of {group.name} with {num_free} free values")


class OrbitFields(nn.Module):
    """Fields of one irrep on a grid, from their free values. It has no parameters.

    Shape: (..., num_free) -> (..., d, H, W).
    """

    index: Tensor
    sign: Tensor

    def __init__(self, group: Group, irrep: Irrep, size: tuple[int, int], device=None, dtype=None) -> None:
        super().__init__()
        self.table = orbit_table(group, irrep, size)
        self.shape = (irrep.dim, *size)
        self.num_free = len(self.table.representatives)
        self.register_buffer("index", torch.tensor(self.table.index, device=device), persistent=False)
        dtype = dtype or torch.get_default_dtype()
        self.register_buffer("sign", torch.tensor(self.table.sign, device=device, dtype=dtype), persistent=False)

    @torch.no_grad()
    def reset_tables(self) -> None:
        """Writes the tables again, for a module that was created on the meta device."""
        self.index.copy_(torch.tensor(self.table.index, device="cpu"))
        self.sign.copy_(torch.tensor(self.table.sign, device="cpu"))

    def forward(self, free: Tensor) -> Tensor:
        entries = F.pad(free, (0, 1)).index_select(-1, self.index) * self.sign.to(free.dtype)
        return entries.unflatten(-1, self.shape)

    def free_values(self, fields: Tensor) -> Tensor:
        """The free values of given fields: their values at the first entry of each orbit."""
        entries = torch.tensor(self.table.representatives, dtype=torch.long, device=fields.device)
        return fields.flatten(-3).index_select(-1, entries)

    def extra_repr(self) -> str:
        return f"{self.num_free} -> {self.shape}"
