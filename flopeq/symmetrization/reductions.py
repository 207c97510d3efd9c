"""How the outputs of the passes become one: scores of every element of the group and every image, and weights of sum 1.

Legend: G elements of the group, B images.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

How = Literal["average", "weighted", "choose", "canonical"]
HOW = ("average", "weighted", "choose", "canonical")


def check_how(how: str) -> None:
    """Raises ValueError for an unknown value of `how`."""
    if how not in HOW:
        raise ValueError(f"how={how!r} is unknown: use one of {', '.join(map(repr, HOW))}")


class WeightNet(nn.Module):
    """log lambda(g x) from the pooled features of g x. It starts as a constant, so that the weights start equal.

    Basu et al. 2023 ("Efficient Equivariant Transfer Learning from Pretrained Models"): lambda-equitune.

    Shape: (B, C) -> (B,).
    """

    def __init__(self, num_features: int, hidden_features: int = 32) -> None:
        super().__init__()
        self.fc1 = nn.Linear(num_features, hidden_features)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_features, 1)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, pooled_BC: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(pooled_BC))).squeeze(-1)


def build_weight_net(model: nn.Module) -> WeightNet:
    """A WeightNet for the pooled features of a timm model. Raises: ValueError for a model without timm's methods."""
    width = getattr(model, "head_hidden_size", None) or getattr(model, "num_features", None)
    if width is None or not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
        raise ValueError(
            f"how='weighted' computes weights from pooled features, and {type(model).__name__} does not have timm's "
            "forward_features, forward_head and num_features: use another `how`"
        )
    like = next(model.parameters(), torch.empty(0))
    return WeightNet(width).to(like.device, like.dtype)


def confidence(logits: Tensor) -> Tensor:
    """The score of `choose`: the largest probability, averaged over positions if there are any (equizero).

    Shape: (B, classes, ...) -> (B,).
    Raises: ValueError if there are not at least two classes.
    """
    if logits.dim() < 2 or logits.shape[1] < 2:
        raise ValueError(
            f"how='choose' compares the probabilities of classes, and outputs of shape {tuple(logits.shape)} have none"
        )
    return logits.softmax(1).amax(1).reshape(logits.shape[0], -1).mean(1)


def reference_image(height: int, width: int, like: Tensor) -> Tensor:
    """The image to which `canonical` compares all images: sin(3u + 2v + 1) at column u and row v in [-1, 1].

    It is fixed, has any size, and no symmetry of the square leaves it unchanged.

    Shape: (H, W), with the dtype and the device of `like`.
    """
    v, u = (
        torch.arange(1 - size, size, 2, dtype=like.dtype, device=like.device) / max(size - 1, 1)
        for size in (height, width)
    )
    return torch.sin(3 * u + 2 * v.unsqueeze(-1) + 1)


def fit(images_BCHW: Tensor, reference_HW: Tensor) -> Tensor:
    """The score of `canonical`: the inner product of an image, summed over channels, with the reference.

    Shape: (B, C, H, W), (H, W) -> (B,).
    """
    return (images_BCHW.sum(1) * reference_HW).sum((-2, -1))


def equal_shares(scores_GB: Tensor) -> Tensor:
    """Weight 1 for the largest score of each image. Equal scores share it, so that no order decides."""
    is_largest = (scores_GB == scores_GB.amax(0)).to(scores_GB.dtype)
    return is_largest / is_largest.sum(0)


def has_tie(scores_GB: Tensor, views_GBCHW: Tensor, tolerance: float) -> Tensor:
    """Whether different views of an image have its largest score, to a tolerance. Shape: -> (B,), boolean.

    Views that are equal, because a symmetry leaves the image unchanged, are not different.
    """
    largest, index = scores_GB.max(0)
    first = views_GBCHW[index, torch.arange(views_GBCHW.shape[1], device=index.device)]
    differs = (views_GBCHW != first).flatten(2).any(2)
    return (differs & (scores_GB >= largest - tolerance)).any(0)
