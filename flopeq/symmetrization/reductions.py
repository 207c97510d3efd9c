"""How the outputs of the passes become one: weights for every element of the group and every image, of sum 1."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

HOW = ("average", "weighted", "choose", "canonical")


class WeightNet(nn.Module):
    """log lambda(g x), from the pooled features of g x: a small network that starts as a constant.

    Basu et al. 2023 ("Efficient equivariant transfer learning from pretrained models"): lambda-equitune, here with the
    normalization of the formula, sum_g lambda(g x) = 1, as a softmax over the group.

    Shape: (B, C) -> (B,).
    """

    def __init__(self, num_features: int, hidden: int = 32) -> None:
        super().__init__()
        self.fc1 = nn.Linear(num_features, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, 1)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, pooled_BC: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(pooled_BC))).squeeze(-1)


def confidence(logits: Tensor) -> Tensor:
    """The largest probability, the mean over positions if there are any: the score by which `choose` chooses.

    Shape: (B, classes, ...) -> (B,).
    """
    if logits.dim() < 2 or logits.shape[1] < 2:
        raise ValueError(
            f"how='choose' compares probabilities of classes, and the output of shape {tuple(logits.shape)} has none"
        )
    return logits.softmax(1).amax(1).flatten(1).mean(1) if logits.dim() > 2 else logits.softmax(1).amax(1)


def reference(height: int, width: int, like: Tensor) -> Tensor:
    """The fixed image to which `canonical` compares every image: sin(3u + 2v + 1) on [-1, 1] x [-1, 1].

    No symmetry of the square leaves it as it is, so the best fit is unique for almost every image.

    Shape: (H, W), with the dtype and device of `like`.
    """
    v = torch.linspace(-1, 1, height, dtype=like.dtype, device=like.device)
    u = torch.linspace(-1, 1, width, dtype=like.dtype, device=like.device)
    return torch.sin(3 * u + 2 * v[:, None] + 1)


def fit_to_reference(images_BCHW: Tensor) -> Tensor:
    """The inner product of each image, summed over its channels, with the reference. Shape: (B, C, H, W) -> (B,)."""
    height, width = images_BCHW.shape[-2:]
    return (images_BCHW.sum(1) * reference(height, width, images_BCHW)).flatten(1).sum(1)


def equal_shares(scores_GB: Tensor) -> Tensor:
    """Weight 1 for the largest score of each image; several that are equal share it, so that order does not matter."""
    largest = (scores_GB == scores_GB.amax(0)).to(scores_GB.dtype)
    return largest / largest.sum(0)


def first_largest(scores_GB: Tensor) -> Tensor:
    """The index of the element with the largest score, the first of equal ones. Shape: (G, B) -> (B,)."""
    return scores_GB.argmax(0)


def tied(scores_GB: Tensor, tolerance: float) -> Tensor:
    """Which elements reach the largest score of each image, to a tolerance. Shape: (G, B) -> (G, B), boolean."""
    assert math.isfinite(tolerance)
    return scores_GB >= scores_GB.amax(0) - tolerance
