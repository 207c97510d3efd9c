"""Runs a network on transformed images, and combines the outputs: what every symmetrized network shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from flopeq.square import Symmetry
from flopeq.symmetrization.outputs import Action


def check_shape(images: Tensor, group: Iterable[Symmetry]) -> None:
    """Raises ValueError if a symmetry swaps rows and columns of images that are not square."""
    height, width = images.shape[-2:]
    swapping = next((g for g in group if g.swaps_axes), None)
    if height != width and swapping:
        raise ValueError(
            f"images of {height} x {width} are not square, and the {swapping} swaps rows and columns: crop or pad the "
            "images to squares, or use a group without quarter turns and transpositions, such as flop*flip"
        )


def run_passes(
    compute: Callable[[Tensor], list[Tensor]], views: Sequence[Tensor], batched: bool
) -> list[tuple[Tensor, ...]]:
    """The outputs of `compute` on each view, one tuple for each output: in one batch, or one view after the other."""
    if batched and len(views) > 1:
        outputs = compute(torch.cat(list(views)))
        return [output.unflatten(0, (len(views), views[0].shape[0])).unbind() for output in outputs]
    return list(zip(*(compute(view) for view in views), strict=True))


def map_back(action: Action, group: Iterable[Symmetry], outputs: Iterable[Tensor]) -> list[Tensor]:
    """rho(g)^-1 y_g for each element g."""
    return [action(g.inverse, y) for g, y in zip(group, outputs, strict=True)]


def average(outputs: Sequence[Tensor]) -> Tensor:
    """The mean over the group."""
    return outputs[0] if len(outputs) == 1 else torch.stack(list(outputs)).mean(0)


def weighted_sum(outputs: Sequence[Tensor], weights_GB: Tensor) -> Tensor:
    """sum_g w_g y_g, with weights for every element of the group and every image."""
    shape = (-1, *(1,) * (outputs[0].dim() - 1))
    return torch.stack([w.to(y.dtype).view(shape) * y for w, y in zip(weights_GB, outputs, strict=True)]).sum(0)


def orbit_average(
    model: Callable[[Tensor], Tensor], images: Tensor, group: Sequence[Symmetry], action: Action, batched: bool
) -> Tensor:
    """1/|G| sum_g rho(g)^-1 M(g x): |G| passes (equitune, Basu et al. 2023)."""
    check_shape(images, group)
    [outputs] = run_passes(lambda views: [model(views)], [g(images) for g in group], batched)
    return average(map_back(action, group, outputs))
