"""Any network made invariant or equivariant: M_G(x) = sum_g w_g(x) rho(g)^-1 M(g x), with weights of sum 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, cast

import torch
from torch import Tensor, nn

from flopeq.square import Symmetry, symmetry_group
from flopeq.symmetrization.outputs import Action, Permutations, resolve_action
from flopeq.symmetrization.reductions import (
    HOW,
    WeightNet,
    confidence,
    equal_shares,
    first_largest,
    fit_to_reference,
)

How = Literal["average", "weighted", "choose", "canonical"]


def symmetrize(
    model: nn.Module,
    group: str | Iterable[Symmetry] = "flop",
    how: How = "average",
    output: Literal["invariant", "grid"] | Permutations | Action = "invariant",
    batched: bool = True,
) -> Symmetrized:
    """Wraps a network so that f(g x) = rho(g) f(x) for every g of the group, exactly."""
    return Symmetrized(model, symmetry_group(group), how, resolve_action(output), batched)


class Symmetrized(nn.Module):
    """f(x) = sum_g w_g(x) rho(g)^-1 M(g x). See `symmetrize`."""

    def __init__(self, model: nn.Module, group: tuple[Symmetry, ...], how: How, output: Action, batched: bool) -> None:
        super().__init__()
        if how not in HOW:
            raise ValueError(f"how={how!r} is unknown: use one of {', '.join(map(repr, HOW))}")
        self.model = model
        self.group = group
        self.how = how
        self.output = output
        self.batched = batched
        if how == "weighted":
            self.weight_net = _weight_net(model)
        self.train(model.training)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self._symmetrize(x_BCHW, self._logits, [self.output])[0]

    def _logits(self, views: Tensor) -> tuple[list[Tensor], Tensor | None]:
        if self.how == "weighted":
            features = self._model.forward_features(views)
            scores = self.weight_net(self._model.forward_head(features, pre_logits=True))
            return [self._model.forward_head(features)], scores
        logits = self.model(views)
        return [logits], confidence(logits) if self.how == "choose" else None

    @property
    def _model(self) -> Model:
        return cast("Model", self.model)

    def _symmetrize(
        self, x: Tensor, compute: Callable[[Tensor], tuple[list[Tensor], Tensor | None]], actions: list[Action]
    ) -> list[Tensor]:
        self._check_shape(x)
        images = [g(x) for g in self.group]
        if self.how == "canonical":
            scores = torch.stack([fit_to_reference(image) for image in images])
            index = first_largest(scores)
            chosen = torch.stack(images)[index, torch.arange(len(x), device=x.device)]
            outputs, _ = compute(chosen)
            weights = torch.nn.functional.one_hot(index, len(self.group)).T
            return [
                _weighted_sum([action(g.inverse, y) for g in self.group], weights)
                for action, y in zip(actions, outputs, strict=True)
            ]
        if self.batched:
            outputs, scores = compute(torch.cat(images))
            passes = [output.chunk(len(images)) for output in outputs]
            scores_GB = None if scores is None else scores.unflatten(0, (len(images), -1))
        else:
            computed = [compute(image) for image in images]
            passes = list(zip(*(outputs for outputs, _ in computed), strict=True))
            scores_GB = None if computed[0][1] is None else torch.stack([cast("Tensor", s) for _, s in computed])
        weights = None
        if scores_GB is not None:
            weights = scores_GB.softmax(0) if self.how == "weighted" else equal_shares(scores_GB)
        return [
            _weighted_sum([action(g.inverse, y) for g, y in zip(self.group, ys, strict=True)], weights)
            for action, ys in zip(actions, passes, strict=True)
        ]

    def _check_shape(self, x: Tensor) -> None:
        height, width = x.shape[-2:]
        if height != width and any(g.swaps_axes for g in self.group):
            raise ValueError(
                f"images of {height} x {width} are not square, and {next(g for g in self.group if g.swaps_axes)} "
                "swaps rows and columns: pad or crop them to squares, or use a subgroup of flop*flip"
            )


class Model:
    """What timm's models offer, for the type checker."""

    forward_features: Callable[..., Tensor]
    forward_head: Callable[..., Tensor]


def _weight_net(model: nn.Module) -> WeightNet:
    width = getattr(model, "head_hidden_size", None) or getattr(model, "num_features", None)
    if width is None or not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
        raise ValueError(
            f"how='weighted' weighs by pooled features, and {type(model).__name__} has no forward_features, "
            "forward_head and num_features, as timm's models have: use another `how`"
        )
    like = next(model.parameters())
    return WeightNet(width).to(like.device, like.dtype)


def _weighted_sum(ys: list[Tensor], weights_GB: Tensor | None) -> Tensor:
    if weights_GB is None:
        return torch.stack(ys).mean(0)
    ones = (1,) * (ys[0].dim() - 1)
    return torch.stack([w.to(y.dtype).view(-1, *ones) * y for w, y in zip(weights_GB, ys, strict=True)]).sum(0)
