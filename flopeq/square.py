"""The eight symmetries of the square, which act on images and grids, and the groups that they form.

The *flop* mirrors an image horizontally, the *flip* vertically. Turns are counterclockwise, as in `torch.rot90`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, order=True)
class Symmetry:
    """A flop if `mirrored`, followed by a number of quarter turns, 0 to 3."""

    turns: int = 0
    mirrored: bool = False

    def __call__(self, x: Tensor, dims: tuple[int, int] = (-2, -1)) -> Tensor:
        """Acts on the rows and the columns of images or grids, whose axes are `dims`.

        Shape: (..., H, W) -> the same, or (..., W, H) if the symmetry swaps rows and columns.
        """
        rows, columns = dims
        if self.swaps_axes:
            x = x.transpose(rows, columns)
        flipped = [rows] * (self.turns in ((2, 3) if self.mirrored else (1, 2)))
        flipped += [columns] * (self.turns in ((0, 3) if self.mirrored else (2, 3)))
        return x.flip(flipped) if flipped else x

    def __matmul__(self, first: Symmetry) -> Symmetry:
        """The composition: (g @ h)(x) = g(h(x))."""
        turns = self.turns + (-first.turns if self.mirrored else first.turns)
        return Symmetry(turns % 4, self.mirrored != first.mirrored)

    @property
    def inverse(self) -> Symmetry:
        """The symmetry that undoes this one."""
        return self if self.mirrored else Symmetry(-self.turns % 4)

    @property
    def swaps_axes(self) -> bool:
        """Whether rows become columns, so that only a square grid keeps its shape."""
        return self.turns % 2 == 1

    def __str__(self) -> str:
        return _NAMES[self]


IDENTITY = Symmetry()
FLOP = Symmetry(0, mirrored=True)
FLIP = Symmetry(2, mirrored=True)
TURN = Symmetry(2)
QUARTER_TURN = Symmetry(1)
TRANSPOSE = Symmetry(1, mirrored=True)

_NAMES = {
    IDENTITY: "identity",
    FLOP: "flop",
    FLIP: "flip",
    TURN: "half turn",
    QUARTER_TURN: "quarter turn",
    QUARTER_TURN.inverse: "quarter turn back",
    TRANSPOSE: "transposition",
    Symmetry(3, mirrored=True): "transposition about the other diagonal",
}

_GENERATORS = {
    "trivial": (),
    "flop": (FLOP,),
    "flip": (FLIP,),
    "turn": (TURN,),
    "transpose": (TRANSPOSE,),
    "c4": (QUARTER_TURN,),
    "d4": (QUARTER_TURN, FLOP),
}


def generated_by(generators: Iterable[Symmetry]) -> tuple[Symmetry, ...]:
    """All compositions of some symmetries, sorted, starting with the identity."""
    elements, found = {IDENTITY}, {IDENTITY, *generators}
    while found != elements:
        elements = found
        found = {g @ h for g in elements for h in elements}
    return tuple(sorted(elements))


def symmetry_group(group: str | Iterable[Symmetry]) -> tuple[Symmetry, ...]:
    """The elements of a group, sorted, starting with the identity.

    `group` is a name (flop, flip, turn, transpose, c4, d4, trivial), names joined by `*` for the group that they
    generate together, such as "flop*flip", or the symmetries themselves.
    Raises: ValueError for an unknown name, and for symmetries that do not form a group, naming what is missing.
    """
    if isinstance(group, str):
        names = group.split("*")
        unknown = [name for name in names if name not in _GENERATORS]
        if unknown:
            raise ValueError(f"group {group!r} is unknown: use {', '.join(_GENERATORS)}, or join them, as in flop*flip")
        return generated_by(generator for name in names for generator in _GENERATORS[name])
    elements = tuple(sorted(set(group)))
    missing = sorted(set(generated_by(elements)) - set(elements))
    if missing:
        raise ValueError(
            f"{', '.join(map(str, elements)) or 'no symmetries'}: not a group, because their compositions also give "
            f"{', '.join(map(str, missing))}"
        )
    return elements
