"""Any network made invariant or equivariant: f(x) = sum_g w_g(x) rho(g)^-1 M(g x), with weights of sum 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flopeq.square import Symmetry, symmetry_group
from flopeq.symmetrization import reductions
from flopeq.symmetrization.features import final_action, intermediate_action
from flopeq.symmetrization.forwarded import TimmModel
from flopeq.symmetrization.outputs import Action, Permutations, resolve_action
from flopeq.symmetrization.passes import average, check_shape, map_back, run_passes, weighted_sum
from flopeq.symmetrization.reductions import How

Compute = Callable[[Tensor], tuple[list[Tensor], Tensor | None]]
"""Images -> outputs, and the scores of the images if `how` needs them."""


def symmetrize(
    model: nn.Module,
    group: str | Iterable[Symmetry] = "flop",
    how: How = "average",
    output: Literal["invariant", "grid"] | Permutations | Action = "invariant",
    batched: bool = True,
) -> Symmetrized:
    """Makes any network equivariant: f(g x) = rho(g) f(x) for every g of a group, by construction.

    Args:
        model: a timm model, or any network that takes images (B, C, H, W). It is wrapped, not copied, and its mode
            (training or evaluation) stays as it is.
        group: a name (flop, flip, turn, transpose, c4, d4), names joined by `*` such as "flop*flip", or the symmetries.
        how: "average": the mean over the group (equitune), |G| passes. "weighted": a mean with weights that a small
            network computes from the pooled features (lambda-equitune); it starts as the average and has to be
            trained. "choose": the pass with the largest probability (equizero). "canonical": one pass, for the
            transformed image that fits a fixed reference best.
        output: how the group acts on outputs, rho. "invariant": not at all, as on logits. "grid": on their rows and
            columns, as on masks. Permutations of their channels, such as {FLOP: [1, 0]} for a left and a right
            keypoint. Or a function (g, y) -> rho(g) y.
        batched: run all passes in one batch of |G| B images, or one after the other, which needs less memory.
    Raises: ValueError for an unknown group, `how` or `output`, and later for images that the group cannot act on.
    """
    return Symmetrized(model, group, how, output, batched)


class Symmetrized(TimmModel):
    """A network that commutes with a group. `symmetrize` makes it and describes the arguments.

    It has the methods of timm's models. The features are equivariant as well: `forward_features` and
    `forward_intermediates` map the features of the passes back and combine them with the same weights as the logits.
    Parameters have the names of the network's with the prefix `model.`, and `weight_net.` for those of "weighted".
    """

    def __init__(
        self,
        model: nn.Module,
        group: str | Iterable[Symmetry],
        how: How = "average",
        output: Literal["invariant", "grid"] | Permutations | Action = "invariant",
        batched: bool = True,
    ) -> None:
        super().__init__(model)
        reductions.check_how(how)
        group = group if isinstance(group, str) else tuple(group)
        self.group = symmetry_group(group)
        self.how: How = how
        self.output = resolve_action(output)
        self.batched = batched
        if how == "weighted":
            self.weight_net = reductions.build_weight_net(model)
        self.record_arguments(group=group, how=how, output=output)
        self.train(model.training)

    def extra_repr(self) -> str:
        return f"group=({', '.join(map(str, self.group))}), how={self.how!r}, batched={self.batched}"

    def forward(self, x_BCHW: Tensor) -> Tensor:
        [logits] = self._combine(x_BCHW, self._compute_logits, lambda position: self.output)
        return logits

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """The network's features, mapped back and combined: f(g x) = g f(x), on their grid.

        Raises: ValueError for tokens if the network does not tell which grid they form.
        """
        action = self._final_action(x_BCHW)
        [features] = self._combine(x_BCHW, self._compute_features, lambda position: action)
        return features

    def forward_intermediates(
        self,
        x_BCHW: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """Features of the selected blocks, as in timm, mapped back and combined. Takes output_fmt "NCHW" or "NLC"."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} is not supported: use 'NCHW' or 'NLC'")
        needs_final = not intermediates_only or self.how in ("weighted", "choose")
        args = {"norm": norm, "stop_early": stop_early and not needs_final, "intermediates_only": not needs_final}
        if return_prefix_tokens:
            args["return_prefix_tokens"] = True

        def compute(images: Tensor) -> tuple[list[Tensor], Tensor | None]:
            found = self.timm_model.forward_intermediates(images, indices=indices, **args)
            final, blocks = found if needs_final else (None, found)
            parts = [part for block in blocks for part in (block if return_prefix_tokens else (block,))]
            return ([] if final is None else [final]) + parts, None if final is None else self._score(final)

        def action_of(position: int) -> Action:
            if needs_final and position == 0:
                return self._final_action(x_BCHW)
            block = (position - needs_final) // (2 if return_prefix_tokens else 1)
            return intermediate_action(self.innermost, self.group, indices, block)

        outputs = self._combine(x_BCHW, compute, action_of)
        final, parts = (outputs[0], outputs[1:]) if needs_final else (None, outputs)
        if output_fmt == "NLC":
            parts = [part.flatten(2).transpose(1, 2) if part.dim() == 4 else part for part in parts]
        blocks = list(zip(parts[::2], parts[1::2], strict=True)) if return_prefix_tokens else parts
        return blocks if intermediates_only or final is None else (final, blocks)

    def ties(self, images_BCHW: Tensor, tolerance: float = 1e-6) -> Tensor:
        """Whether "choose" or "canonical" has no unique choice for an image. Shape: (B, C, H, W) -> (B,), boolean.

        For such an image the law need not hold. Scores that differ by less than `tolerance` tie: probabilities for
        "choose", inner products with the reference over the norm of the image for "canonical". An image that a symmetry
        leaves unchanged does not tie with itself.
        Raises: ValueError for another `how`, which chooses nothing.
        """
        check_shape(images_BCHW, self.group)
        views = [g(images_BCHW) for g in self.group]
        if self.how == "canonical":
            scores_GB = self._fits(views) / images_BCHW.flatten(1).norm(dim=1).clamp_min(1e-30)
        elif self.how == "choose":
            scores_GB = torch.stack([reductions.confidence(self.model(view)) for view in views])
        else:
            raise ValueError(f"how={self.how!r} combines all elements of the group, so that there are no ties")
        return reductions.has_tie(scores_GB, torch.stack(views), tolerance)

    def _combine(self, x: Tensor, compute: Compute, action_of: Callable[[int], Action]) -> list[Tensor]:
        """sum_g w_g rho(g)^-1 y_g for each output y of `compute`. `action_of` gives rho for its position."""
        check_shape(x, self.group)
        views = [g(x) for g in self.group]
        if self.how == "canonical":
            index = self._fits(views).max(0).indices
            outputs, _ = compute(torch.stack(views)[index, torch.arange(x.shape[0], device=x.device)])
            passes = [[output] * len(self.group) for output in outputs]
            weights_GB = F.one_hot(index, len(self.group)).transpose(0, 1)
        else:
            passes, weights_GB = self._run(compute, views)
        mapped = [map_back(action_of(position), self.group, ys) for position, ys in enumerate(passes)]
        return [average(ys) if weights_GB is None else weighted_sum(ys, weights_GB) for ys in mapped]

    def _run(self, compute: Compute, views: list[Tensor]) -> tuple[list[Sequence[Tensor]], Tensor | None]:
        """The outputs on every view, and the weights of the passes; None for equal weights."""

        def outputs_and_scores(images: Tensor) -> list[Tensor]:
            outputs, scores = compute(images)
            return outputs if scores is None else [*outputs, scores]

        passes: list[Sequence[Tensor]] = [*run_passes(outputs_and_scores, views, self.batched)]
        if self.how == "average":
            return passes, None
        scores_GB = torch.stack(list(passes.pop()))
        return passes, scores_GB.softmax(0) if self.how == "weighted" else reductions.equal_shares(scores_GB)

    def _fits(self, views: list[Tensor]) -> Tensor:
        reference = reductions.reference_image(*views[0].shape[-2:], like=views[0])
        return torch.stack([reductions.fit(view, reference) for view in views])

    def _compute_logits(self, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
        if self.how == "weighted":
            features = self.timm_model.forward_features(images)
            return [self.timm_model.forward_head(features)], self._score(features)
        logits = self.model(images)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"{type(self.model).__name__} returns a {type(logits).__name__}, not one tensor: wrap it in a module "
                "that returns the output to be symmetrized"
            )
        return [logits], reductions.confidence(logits) if self.how == "choose" else None

    def _compute_features(self, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
        features = self.timm_model.forward_features(images)
        return [features], self._score(features)

    def _score(self, features: Tensor) -> Tensor | None:
        """The scores of images by their features, for the values of `how` that need them."""
        if self.how == "weighted":
            return self.weight_net(self.timm_model.forward_head(features, pre_logits=True))
        if self.how == "choose":
            return reductions.confidence(self.timm_model.forward_head(features))
        return None

    def _final_action(self, x: Tensor) -> Action:
        return final_action(self.innermost, self.group, (x.shape[-2], x.shape[-1]))
