"""Networks that classify several images of one class, which are turned independently: three designs of one network.

logits = head(h_1, ..., h_N) with h_i = encoder(x_i), and for invariance under quarter turns of each image, |G| = 4:

| design | logits | encoder passes |
| --- | --- | --- |
| plain | head(h_1, ..., h_N) | N |
| efficient | head of the means of h_i over the turns of x_i | 4 N |
| full product | mean of the plain network's logits over all 4^N combinations of turns | 4^N N, or 4 N if shared |

Legend: B batch, N images, G turns, P combinations of turns, C channels, K classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from flopeq import MultiView
from flopeq.square import symmetry_group

Design = Literal["plain", "efficient", "full product"]

DESIGNS: tuple[Design, ...] = ("plain", "efficient", "full product")

GROUP = symmetry_group("c4")


class Head(nn.Module):
    """Joins the features of all images by a hidden layer. Shape: (..., N, C) -> (..., K)."""

    def __init__(self, num_images: int, num_features: int, num_classes: int, hidden: int = 64) -> None:
        super().__init__()
        self.num_images = num_images
        self.norm = nn.LayerNorm(num_features)
        self.fc1 = nn.Linear(num_images * num_features, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, features_NC: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.norm(features_NC).flatten(-2))))

    def average_over_turns(self, features_BNGC: Tensor) -> Tensor:
        """The mean of the logits over all combinations of turns, (B, K).

        Both linear layers are outside the sum over combinations: the first adds up what it makes of each image, and the
        last commutes with the mean.
        """
        weight_NCH = self.fc1.weight.T.unflatten(0, (self.num_images, -1))
        parts_NBGH = torch.einsum("bngc,nch->nbgh", self.norm(features_BNGC), weight_NCH)
        hidden_BPH = parts_NBGH[0]
        for part_BGH in parts_NBGH[1:]:
            hidden_BPH = (hidden_BPH[:, :, None] + part_BGH[:, None]).flatten(1, 2)
        return self.fc2(self.act(hidden_BPH + self.fc1.bias).mean(1))


class _OnList(nn.Module):
    """The head, which takes the features as a list of N tensors (B, C)."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.head(torch.stack(features, dim=1))


def build_network(encoder: nn.Module, head: Head, design: Design) -> MultiView:
    """Builds the complete network of a design, which takes N tensors of images."""
    return MultiView(
        [encoder] * head.num_images,
        "trivial" if design == "plain" else "c4",
        fuse=_OnList(head),
        full=design == "full product",
    )


def fuse(head: Head, features_BNGC: Tensor, design: Design) -> Tensor:
    """The logits of a design, from the features of every turn of each image, the image as it is first: (B, K).

    The full product needs each turn of each image only once here, because its encoder treats images one by one.
    """
    if design == "plain":
        return head(features_BNGC[:, :, 0])
    if design == "efficient":
        return head(features_BNGC.mean(2))
    return head.average_over_turns(features_BNGC)


class SharedFullProduct(nn.Module):
    """The full product with shared encoder passes. Shape: N tensors (B, 3, H, W) -> (B, K)."""

    def __init__(self, encoder: nn.Module, head: Head) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, *images_BCHW: Tensor) -> Tensor:
        turned = torch.cat([g(image) for image in images_BCHW for g in GROUP])
        features_BNGC = self.encoder(turned).unflatten(0, (len(images_BCHW), len(GROUP), -1)).permute(2, 0, 1, 3)
        return fuse(self.head, features_BNGC, "full product")
