"""Code shared by all families for groups beyond the flop: the group of each block, restriction, invariant head."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from flopeq.groups import C2, GROUPS, TRIVIAL, Group
from flopeq.models.variants import InvariantHead
from flopeq.registry import MODELS

HEADS = ("trivial", "power")


def block_groups(name: str, depth: int, symmetry: str | None, num_group_blocks: int | None) -> tuple[Group, ...]:
    """The group of each block of a registered model. Ordinary blocks have the trivial group.

    Without arguments all blocks, or the first half of a hybrid's, have the group of the model's name.
    `num_group_blocks` is another number of them, and `symmetry` is read by `parse_symmetry`.
    Raises: ValueError as `parse_symmetry` does, if both arguments are given, or for a number beyond 0 to depth.
    """
    info = MODELS[name]
    if symmetry is not None:
        if num_group_blocks is not None:
            raise ValueError(f"num_group_blocks={num_group_blocks} has no effect beside symmetry={symmetry!r}")
        return parse_symmetry(symmetry, depth)
    if num_group_blocks is None:
        num_group_blocks = depth // 2 if info.hybrid else depth
    if not 0 <= num_group_blocks <= depth:
        raise ValueError(f"num_group_blocks={num_group_blocks} is not valid: use 0 (X) to {depth}")
    assert info.group is not None
    return (GROUPS[info.group],) * num_group_blocks + (TRIVIAL,) * (depth - num_group_blocks)


def parse_symmetry(symmetry: str, depth: int) -> tuple[Group, ...]:
    """The group of each block from a text such as "d4:4,c2:8": four blocks of D4, then eight of C2.

    The groups are d4, c2xc2 and c2, and x for ordinary blocks. The last one may leave out its number and then takes the
    remaining blocks, as in "d4:4,c2". Blocks that are not named are ordinary: "d4:4" is a hybrid.
    Raises: ValueError for an unknown group, a number that is not positive, more than `depth` blocks, and a group that
    is no subgroup of the one before, because features of a larger group cannot be made from those of a smaller one.
    """
    names = {"x" if group is TRIVIAL else group.name: group for group in GROUPS.values()}
    groups: list[Group] = []
    entries = symmetry.replace(" ", "").split(",")
    for index, entry in enumerate(entries):
        name, colon, number = entry.partition(":")
        if name not in names:
            raise ValueError(f"symmetry={symmetry!r}: {name!r} is unknown, use {', '.join(names)}, as in d4:4,c2:8")
        if not colon and index < len(entries) - 1:
            raise ValueError(f"symmetry={symmetry!r}: say how many blocks {name} has, as in {name}:4")
        if colon and not (number.isdecimal() and int(number)):
            raise ValueError(f"symmetry={symmetry!r}: {number!r} is not a number of blocks")
        groups += [names[name]] * (int(number) if colon else depth - len(groups))
    if len(groups) > depth:
        raise ValueError(f"symmetry={symmetry!r} names {len(groups)} blocks, but the depth is {depth}")
    groups += [TRIVIAL] * (depth - len(groups))
    for before, after in pairwise(groups):
        if not before.contains(after):
            raise ValueError(f"symmetry={symmetry!r}: {after.name} cannot follow {before.name}, use d4, c2xc2, c2, x")
    return tuple(groups)


def format_symmetry(groups: Sequence[Group]) -> str:
    """The text from which `parse_symmetry` makes these groups."""
    runs = [(group, len(list(run))) for group, run in groupby(groups)]
    return ",".join(f"{'x' if group is TRIVIAL else group.name}:{number}" for group, number in runs)


class RestrictsFirst:
    """Mixin for a block that first restricts its features from the group of the block before to its own group."""

    group_before: Group
    group: Group

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(self.group_before.restrict(x, self.group), *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


class GroupHead(InvariantHead):
    """Mixin for timm models whose head gets features that the group of the last block leaves alone.

    `head="trivial"` selects the first irrep, C/|G| features. `"power"` has all irreps: the first as it is, and of the
    others the absolute values, and the norm over the rows of a two-dimensional irrep. That is C features for C2 and
    C2 x C2, and 6C/8 for D4. The default is "power" for groups of more than two symmetries, whose first irrep has few
    features, and "trivial", which is the paper's even head, for C2.
    """

    head_group: Group

    def init_group_head(self, head: str | None, group: Group, **dd: Any) -> None:
        """Resizes the classifier to the number of invariant features; `group` is that of the last block.

        Raises: ValueError as `check_group_head` does.
        """
        check_group_head(head, group)
        self.head_group, self.head_kind = group, head or default_head(group)
        if group is not TRIVIAL:
            dims = [irrep.dim for irrep in group.irreps] if self.head_kind == "power" else [1]
            self.resize_head(sum(dims) * self.embed_dim // group.order, **dd)

    def invariants(self, x: Tensor, dim: int = -1) -> Tensor:
        """The features for the head. `dim` is the channel axis."""
        if self.head_group is TRIVIAL:
            return x
        first, *others = self.head_group.split(x.movedim(dim, -1))
        if self.head_kind == "power":
            norms = [
                part.abs() if irrep.dim == 1 else torch.linalg.vector_norm(part, dim=-2)
                for irrep, part in zip(self.head_group.irreps[1:], others, strict=True)
            ]
            first = torch.cat((first, *norms), -1)
        return first.movedim(-1, dim)


def check_group_head(head: str | None, group: Group) -> None:
    """Raises ValueError for an unknown value of `head`, or one that has no effect. None is the default."""
    if head is not None and head not in HEADS:
        raise ValueError(f"head={head!r} is unknown: use one of {', '.join(map(repr, HEADS))}")
    if head is not None and group is TRIVIAL:
        raise ValueError(f"head={head!r} has no effect after ordinary blocks: leave it out")


def default_head(group: Group) -> str:
    """The head that a network has whose last block has this group."""
    return "power" if group.order > 2 else "trivial"


def flop_arguments(groups: Sequence[Group], head: str | None) -> dict[str, Any]:
    """The arguments with which X, E or H is the network of blocks of C2 and ordinary ones: its split, and E's head."""
    args: dict[str, Any] = {"num_flop_blocks": groups.count(C2)}
    if groups[-1] is C2:
        args["head"] = {"trivial": "even", "power": "even+abs_odd"}[head or default_head(C2)]
    return args
