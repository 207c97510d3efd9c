"""One image and a product of two groups: as many passes as the two have elements together.

Baltaji, Basu, Varshney 2024 ("Efficient Model-Agnostic Multi-Group Equivariant Networks"), section 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from flopeq.square import IDENTITY, Symmetry, symmetry_group
from flopeq.symmetrization.outputs import Action, Permutations, resolve_action
from flopeq.symmetrization.passes import average, check_shape, map_back
from flopeq.symmetrization.reductions import fit, reference_image

Elements = tuple[Symmetry, ...]


def symmetrize_product(
    model: nn.Module,
    groups: tuple[str | Iterable[Symmetry], str | Iterable[Symmetry]] = ("flop", "flip"),
    output: Literal["invariant", "grid"] | Permutations | Action = "invariant",
) -> SymmetrizedProduct:
    """Makes a network equivariant to a direct product G1 x G2 with |G1| + |G2| passes instead of |G1| |G2|.

    Args:
        groups: two groups, as in `symmetrize`, whose elements commute and of which only the identity is in both.
        output: how the groups act on outputs, as in `symmetrize`.
    Raises: ValueError if the product is not direct. A network for the whole group is
        `symmetrize(model, ..., how="canonical")`, with one pass, or `symmetrize(model, ...)`.
    """
    return SymmetrizedProduct(model, symmetry_group(groups[0]), symmetry_group(groups[1]), output)


class SymmetrizedProduct(nn.Module):
    """f(x) = 1/2 [Sym_2 S_1(M)(c_2(x)) + Sym_1 S_2(M)(c_1(x))]. See `symmetrize_product`.

    S_i(M) is the mean over the group G_i of rho(g)^-1 M(g x), Sym_i the mean of rho(g) y over outputs, and c_i(x) the
    image of the orbit G_i x that fits a reference best. The reference of c_2 is invariant to G_1, so that c_2 commutes
    with G_1. The paper adds two networks; here one network has both places, and the mean keeps the scale.

    Each term is invariant to one of the groups: outputs that the groups act on, such as grids, keep only the part that
    one group or the other leaves unchanged. An image that g_1 g_2 maps to itself, but g_1 does not, such as an S under
    the half turn, has two best fits; the law holds for its invariant outputs only.
    """

    def __init__(
        self,
        model: nn.Module,
        first: Elements,
        second: Elements,
        output: Literal["invariant", "grid"] | Permutations | Action = "invariant",
    ) -> None:
        super().__init__()
        check_direct_product(first, second)
        self.model = model
        self.groups = (first, second)
        self.output = resolve_action(output)
        self.train(model.training)

    def extra_repr(self) -> str:
        return "groups=({}; {})".format(*(", ".join(map(str, group)) for group in self.groups))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        first, second = self.groups
        check_shape(x_BCHW, (*first, *second))
        views = [g(canonical(x_BCHW, second, first)) for g in first]
        views += [g(canonical(x_BCHW, first, second)) for g in second]
        outputs = self.model(torch.cat(views)).unflatten(0, (len(views), x_BCHW.shape[0])).unbind()
        return average(
            [
                self._average(first, second, outputs[: len(first)]),
                self._average(second, first, outputs[len(first) :]),
            ]
        )

    def _average(self, equivariant: Elements, invariant: Elements, outputs: tuple[Tensor, ...]) -> Tensor:
        y = average(map_back(self.output, equivariant, outputs))
        return average([self.output(g, y) for g in invariant])


def check_direct_product(first: Elements, second: Elements) -> None:
    """Raises ValueError if two groups do not form a direct product, with the reason."""
    for g in first:
        for h in second:
            if g @ h != h @ g:
                raise ValueError(
                    f"the product of ({', '.join(map(str, first))}) and ({', '.join(map(str, second))}) is not direct: "
                    f"the {g} and the {h} do not commute, and no image of the orbit under one group commutes with the "
                    "other; symmetrize over the group that they generate, such as d4 for quarter turns and a mirror"
                )
    common = set(first) & set(second) - {IDENTITY}
    if common:
        raise ValueError(f"the product is not direct: the {min(common)} is in both groups; leave it out of one")


def canonical(images_BCHW: Tensor, group: Elements, commuting: Elements) -> Tensor:
    """The image of each orbit under `group` that fits the reference best; commutes with the group `commuting`.

    Shape: (B, C, H, W) -> the same.
    """
    views = torch.stack([g(images_BCHW) for g in group])
    reference = reference_image(*images_BCHW.shape[-2:], like=images_BCHW)
    reference = average([g(reference) for g in commuting])
    index = torch.stack([fit(view, reference) for view in views]).max(0).indices
    return views[index, torch.arange(images_BCHW.shape[0], device=index.device)]
