"""Small versions of every registered model, with random values for all parameters."""

from __future__ import annotations

import timm
import torch
from torch import nn

import flopeq  # noqa: F401  registers the models
from flopeq.registry import MODELS

IMAGE = (16, 24)  # two rows and three columns of patches: in an odd grid the flop maps the middle column to itself

EVEN_IMAGE = (16, 32)

SMALL = {
    "vit": {"embed_dim": 16, "depth": 3, "num_heads": 2, "init_values": 0.5},
    "resmlp": {"embed_dim": 16, "num_blocks": 3, "init_values": 0.5},
    "convnext_iso": {"embed_dim": 16, "depth": 3, "ls_init_value": 0.5},
}

OURS = [name for name in MODELS if name not in ("resmlp_12_224", "resmlp_24_224")]  # timm fixes those two sizes

EQUIVARIANT = [name for name, info in MODELS.items() if info.variant == "E"]

HYBRID = [name for name, info in MODELS.items() if info.variant == "H"]

FAMILIES = {info.family: name for name, info in MODELS.items() if info.size == "B" and info.variant == "X"}


def small_model(name: str, image: tuple[int, int] = IMAGE, **kwargs) -> nn.Module:
    """A model of three narrow blocks in float64 and eval mode, its parameters drawn from N(0, 0.3^2)."""
    args = SMALL[MODELS[name].family] | {"img_size": image, "patch_size": 8, "num_classes": 5} | kwargs
    model = timm.create_model(name, **args).double().eval()
    return randomize_parameters(model)


def randomize_parameters(model: nn.Module) -> nn.Module:
    """Draws every parameter from N(0, 0.3^2), seeded."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def random_images(image: tuple[int, int] = IMAGE, batch: int = 2, channels: int = 3) -> torch.Tensor:
    """Random images, (batch, channels, *image), float64."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, channels, *image, generator=generator, dtype=torch.float64)
