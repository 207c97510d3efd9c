"""Networks that classify several images of one class, which are turned independently: three designs of one network.

logits = head(h_1, ..., h_N) with h_i = encoder(x_i), and for invariance under quarter turns of each image, |G| = 4:

| design | logits | encoder passes |
| --- | --- | --- |
| plain | head(h_1, ..., h_N) | N |
| efficient | head of the means of h_i over the turns of x_i | 4 N |
| full product | mean of the plain network's logits over all 4^N combinations of turns | 4^N N, or 4 N if shared |

Legend: B batch, N images, G turns, C channels, K classes.
"""

from __future__ import annotations

from itertools import product
from typing import Literal

import torch
from torch import Tensor, nn

from flopeq.square import symmetry_group

Design = Literal["plain", "efficient", "full product"]

DESIGNS: tuple[Design, ...] = ("plain", "efficient", "full product")

GROUP = symmetry_group("c4")


class Head(nn.Module):
    """Joins the features of all images by a hidden layer. Shape: (..., N, C) -> (..., K)."""

    def __init__(self, num_images: int, num_features: int, num_classes: int, hidden: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(num_features)
        self.fc1 = nn.Linear(num_images * num_features, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, features_NC: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.norm(features_NC).flatten(-2))))


def fuse(head: Head, features_BNGC: Tensor, design: Design) -> Tensor:
    """Logits of a design from the features of all turns of each image, the image as it is first. Returns (B, K)."""
    if design == "plain":
        return head(features_BNGC[:, :, 0])
    if design == "efficient":
        return head(features_BNGC.mean(2))
    num_images = features_BNGC.shape[1]
    turns_PN = torch.tensor(list(product(range(len(GROUP)), repeat=num_images)))
    return head(features_BNGC[:, torch.arange(num_images), turns_PN]).mean(1)


class ViewsNetwork(nn.Module):
    """A complete network. Shape: (B, N, 3, H, W) -> (B, K).

    Args:
        share_passes: whether the full product computes each turn of each image once. Otherwise it runs the plain
            network on every combination, as for a network whose parts are not known.
    """

    def __init__(self, encoder: nn.Module, head: Head, design: Design, *, share_passes: bool = True) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.design: Design = design
        self.share_passes = share_passes

    def forward(self, images_BNCHW: Tensor) -> Tensor:
        if self.design == "plain":
            return self.head(self._encode(images_BNCHW))
        turned_BNGCHW = torch.stack([g(images_BNCHW) for g in GROUP], dim=2)
        if self.design == "efficient" or self.share_passes:
            return fuse(self.head, self._encode(turned_BNGCHW), self.design)
        num_images = images_BNCHW.shape[1]
        turns_PN = torch.tensor(list(product(range(len(GROUP)), repeat=num_images)))
        return self.head(self._encode(turned_BNGCHW[:, torch.arange(num_images), turns_PN])).mean(1)

    def _encode(self, images_CHW: Tensor) -> Tensor:
        """Features of images with any leading axes: (..., C)."""
        leading = images_CHW.shape[:-3]
        return self.encoder(images_CHW.flatten(0, len(leading) - 1)).unflatten(0, leading)
