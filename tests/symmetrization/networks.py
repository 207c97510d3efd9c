"""Tiny networks of several kinds, in float64, and images for them."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

import flopeq  # noqa: F401  registers the models

_VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", _VIT),
    "deit3 without class token": ("deit3_small_patch16_224", {**_VIT, "class_token": False, "global_pool": "avg"}),
    "resnet": ("resnet10t", {"channels": (4, 4, 4, 8)}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2)},
    ),
    "resmlp": ("resmlp_base_24_224", {"img_size": 16, "patch_size": 4, "embed_dim": 8, "num_blocks": 2}),
    "convnext": ("convnext_iso_small", {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2}),
    "E(vit)": ("flop_deit3_small_patch16_224", _VIT),
    "E(resmlp)": ("flop_resmlp_24_224", {"img_size": 16, "patch_size": 4, "embed_dim": 8, "num_blocks": 2}),
    "E(convnext)": ("flop_convnext_iso_small", {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2}),
    "H(vit)": ("flophybrid_deit3_small_patch16_224", _VIT),
}

EQUIVARIANT = ("E(vit)", "E(resmlp)", "E(convnext)")


def tiny(kind: str, **args: Any) -> nn.Module:
    """A network with random parameters, in float64 and evaluation mode, for images of 16 x 16 and 5 classes."""
    name, own = KINDS[kind]
    torch.manual_seed(1)
    return add_noise(timm.create_model(name, **{"num_classes": 5, **own, **args}).double().eval())


def add_noise(model: nn.Module) -> nn.Module:
    """Adds noise to every parameter, so that none is zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def random_images(batch: int = 2, height: int = 16, width: int = 16, seed: int = 3) -> Tensor:
    """(batch, 3, height, width), float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)


class Dense(nn.Module):
    """A small convolutional network with outputs on the grid of the image: (B, 3, H, W) -> (B, channels, H, W)."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, channels, 3, padding=1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.norm(self.conv1(x)).relu())


def dense(channels: int = 3) -> nn.Module:
    torch.manual_seed(2)
    return add_noise(Dense(channels)).eval()


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
