"""Several images, each with a group of its own: as many passes as the groups have elements together.

Baltaji, Basu, Varshney 2024 ("Efficient Model-Agnostic Multi-Group Equivariant Networks"), section 4: the sum of the
orders of the groups instead of their product.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flopeq.square import Symmetry, symmetry_group
from flopeq.symmetrization.outputs import Action, Permutations, invariant, resolve_action
from flopeq.symmetrization.passes import average, check_shape, map_back, orbit_average

Group = str | Iterable[Symmetry]


class MultiView(nn.Module):
    """y_i = S_i(M_i)(x_i) + sum_{j != i} Sym_i(mean_h N_j(h x_j)) for the images x_1 ... x_N of one sample.

    S_i is the symmetrization over the group G_i of image i, 1/|G_i| sum_g rho(g)^-1 M_i(g x_i). Sym_i is the mean
    1/|G_i| sum_g rho(g) y over outputs, and h runs through G_j. Every y_i is equivariant to its own group and invariant
    to the others. Groups of one element give the network that is not equivariant.

    Args:
        models: M_i, one for each image. The same module may appear several times, to share its weights.
        groups: one group for all images, or a sequence with one for each.
        exchange: N_j, one for each image: what image j contributes to the outputs of the others, in the shape of M_i's
            outputs. None for no exchange.
        output: how a group acts on the outputs y_i, as in `symmetrize`.
        fuse: computes the result from the list of the outputs, such as a classifier of them all; only for invariant
            outputs. Without it the result is the tuple of outputs.
        full: symmetrize over the product of the groups instead: the mean over all (g_1 ... g_N) of the whole network,
            prod |G_i| passes instead of sum |G_i|. It is the same function if `fuse` is affine or absent.
        batched: run the passes of a network in one batch, or one after the other.
    Raises: ValueError for numbers of models, groups and images that differ, and for `fuse` of outputs that a group
        changes.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        groups: Group | Sequence[Group],
        *,
        exchange: Sequence[nn.Module] | None = None,
        output: Literal["invariant", "grid"] | Permutations | Action = "invariant",
        fuse: Callable[[list[Tensor]], Tensor] | None = None,
        full: bool = False,
        batched: bool = True,
    ) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.exchange = None if exchange is None else nn.ModuleList(exchange)
        self.groups = _resolve_groups(groups, len(self.models))
        self.output = resolve_action(output)
        self.fuse = fuse
        self.full, self.batched = full, batched
        if self.exchange is not None and len(self.exchange) != len(self.models):
            raise ValueError(f"{len(self.exchange)} networks for the exchange do not fit {len(self.models)} models")
        if fuse is not None and self.output is not invariant:
            raise ValueError("fuse combines outputs of images that turn independently: use it with output='invariant'")

    def extra_repr(self) -> str:
        groups = "; ".join(", ".join(map(str, group)) for group in self.groups)
        return f"groups=({groups}), full={self.full}, batched={self.batched}"

    def forward(self, *images: Tensor) -> Any:
        """Shape: N tensors (B, C, H, W) -> a tuple of N outputs, or what `fuse` returns."""
        if len(images) != len(self.models):
            raise ValueError(
                f"{len(images)} images do not fit {len(self.models)} models: give one image for each model"
            )
        for x, group in zip(images, self.groups, strict=True):
            check_shape(x, group)
        return self._average_over_product(images) if self.full else self._fused(self._outputs(images))

    def _outputs(self, images: Sequence[Tensor]) -> list[Tensor]:
        """y_i of the efficient design."""
        triples = list(zip(self.models, images, self.groups, strict=True))
        outputs = [orbit_average(model, x, group, self.output, self.batched) for model, x, group in triples]
        if self.exchange is None:
            return outputs
        sent = [
            orbit_average(model, x, group, invariant, self.batched)
            for model, x, group in zip(self.exchange, images, self.groups, strict=True)
        ]
        return [
            y + average([self.output(g, _sum_of_others(sent, i)) for g in group])
            for i, (y, group) in enumerate(zip(outputs, self.groups, strict=True))
        ]

    def _plain_outputs(self, images: Sequence[Tensor]) -> list[Tensor]:
        """M_i(x_i) + sum_{j != i} N_j(x_j): the network that the full design averages."""
        outputs = [model(x) for model, x in zip(self.models, images, strict=True)]
        if self.exchange is None:
            return outputs
        sent = [model(x) for model, x in zip(self.exchange, images, strict=True)]
        return [y + _sum_of_others(sent, i) for i, y in enumerate(outputs)]

    def _average_over_product(self, images: Sequence[Tensor]) -> Any:
        elements = list(itertools.product(*self.groups))
        if self.batched:
            views = [torch.cat([gs[i](x) for gs in elements]) for i, x in enumerate(images)]
            shape = (len(elements), images[0].shape[0])
            outputs = [y.unflatten(0, shape).unbind() for y in self._plain_outputs(views)]
        else:
            passes = [self._plain_outputs([g(x) for g, x in zip(gs, images, strict=True)]) for gs in elements]
            outputs = list(zip(*passes, strict=True))
        if self.fuse is not None:
            return average([self.fuse(list(ys)) for ys in zip(*outputs, strict=True)])
        return tuple(average(map_back(self.output, [gs[i] for gs in elements], ys)) for i, ys in enumerate(outputs))

    def _fused(self, outputs: list[Tensor]) -> Any:
        return tuple(outputs) if self.fuse is None else self.fuse(outputs)


def _resolve_groups(groups: Group | Sequence[Group], number: int) -> list[tuple[Symmetry, ...]]:
    items = [groups] if isinstance(groups, str) else list(groups)
    if isinstance(groups, str) or all(isinstance(item, Symmetry) for item in items):
        return [symmetry_group(groups)] * number  # pyright: ignore[reportArgumentType]
    if len(items) != number:
        raise ValueError(f"{len(items)} groups do not fit {number} models: give one for all, or one for each")
    return [symmetry_group(group) for group in items]  # pyright: ignore[reportArgumentType]


def _sum_of_others(ys: list[Tensor], i: int) -> Tensor:
    """sum_{j != i} y_j; zero if there is no other."""
    return torch.stack([y for j, y in enumerate(ys) if j != i] or [torch.zeros_like(ys[i])]).sum(0)
