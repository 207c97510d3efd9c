"""How a group acts on a network's output: not at all, on a grid, by permuting channels, or by a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from flopeq.square import IDENTITY, Symmetry

Action = Callable[[Symmetry, Tensor], Tensor]
"""(g, y) -> rho(g) y, on outputs whose first axis is the batch."""

Permutations = Mapping[Symmetry, Sequence[int]]
"""For each symmetry g, or for generators of the group: channel i of rho(g) y is channel `permutation[i]` of y."""


def invariant(g: Symmetry, y: Tensor) -> Tensor:
    """rho(g) y = y: logits, whose classes do not depend on the orientation of the image."""
    return y


def grid(g: Symmetry, y_BCHW: Tensor) -> Tensor:
    """rho(g) y = g y, on the rows and columns of the last two axes: masks, depth, heatmaps."""
    if y_BCHW.dim() < 3:
        raise ValueError(f"output='grid' needs outputs (B, ..., H, W), and this one is {tuple(y_BCHW.shape)}")
    return g(y_BCHW)


@dataclass(frozen=True)
class ChannelPermutation:
    """rho(g) permutes the channels, axis 1, and with `on_grid` also acts on rows and columns, the last two axes.

    Examples are keypoints of a left and of a right side, which the flop swaps, as scores or as heatmaps.
    """

    permutations: Mapping[Symmetry, tuple[int, ...]]
    on_grid: bool = False

    def __call__(self, g: Symmetry, y: Tensor) -> Tensor:
        if g not in self.permutations:
            raise ValueError(f"no permutation of channels is given or implied for {g}")
        permutation = self.permutations[g]
        if len(permutation) != y.shape[1]:
            raise ValueError(f"the permutation is of {len(permutation)} channels, and the output has {y.shape[1]}")
        if g != IDENTITY:
            y = y[:, list(permutation)]
        return grid(g, y) if self.on_grid else y


def permute_channels(permutations: Permutations, on_grid: bool = False) -> ChannelPermutation:
    """The action in which the given symmetries permute channels, extended to the group that they generate.

    Raises: ValueError if an entry is not a permutation, or if the entries contradict the group's composition, such as
    a flop whose permutation is not its own inverse.
    """
    given = {g: tuple(permutation) for g, permutation in permutations.items()}
    if not given:
        raise ValueError("give the permutation of at least one symmetry, such as {FLOP: [1, 0, 2]}")
    sizes = {len(permutation) for permutation in given.values()}
    for g, permutation in given.items():
        if sorted(permutation) != list(range(len(permutation))) or len(sizes) > 1:
            raise ValueError(f"{list(permutation)}, given for {g}, is not a permutation of {max(sizes)} channels")
    found = {IDENTITY: tuple(range(sizes.pop()))}
    pending = [IDENTITY]
    while pending:
        first = pending.pop()
        for g, permutation in given.items():
            composed = tuple(found[first][i] for i in permutation)  # rho(g) rho(first) y
            if found.setdefault(g @ first, composed) != composed:
                raise ValueError(f"the permutations contradict each other: {g} after {first} is {g @ first}")
            if found[g @ first] is composed:
                pending.append(g @ first)
    return ChannelPermutation(found, on_grid)


def resolve_action(output: str | Permutations | Action) -> Action:
    """The action that the argument `output` stands for. Raises: ValueError for an unknown name."""
    if isinstance(output, Mapping):
        return permute_channels(output)
    if callable(output):
        return output
    actions = {"invariant": invariant, "grid": grid}
    if output not in actions:
        raise ValueError(
            f"output={output!r} is unknown: use {', '.join(map(repr, actions))}, permutations of channels by symmetry, "
            "or a function of a symmetry and an output"
        )
    return actions[output]
