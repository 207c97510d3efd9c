"""Small versions of every registered model, with random values for all parameters."""

from __future__ import annotations

import timm
import torch
from torch import nn

import flopeq  # noqa: F401  registers the models
from flopeq.registry import GROUP_VARIANTS, MODELS, PREFIXES

IMAGE = (16, 24)  # two rows and three columns of patches: in an odd grid the flop maps the middle column to itself

EVEN_IMAGE = (16, 32)

SMALL = {
    "vit": {"embed_dim": 16, "depth": 3, "num_heads": 2, "init_values": 0.5},
    "resmlp": {"embed_dim": 16, "num_blocks": 3, "init_values": 0.5},
    "convnext_iso": {"embed_dim": 16, "depth": 3, "ls_init_value": 0.5},
}

GROUP_MODELS = [name for name, info in MODELS.items() if info.variant in GROUP_VARIANTS]

OURS = [  # timm fixes the sizes of two baselines; models for larger groups have tests of their own
    name for name in MODELS if name not in ("resmlp_12_224", "resmlp_24_224", *GROUP_MODELS)
]

EQUIVARIANT = [name for name, info in MODELS.items() if info.variant == "E"]

HYBRID = [name for name, info in MODELS.items() if info.variant == "H"]

FAMILIES = {info.family: name for name, info in MODELS.items() if info.size == "B" and info.variant == "X"}


SQUARE = (40, 40)  # an odd grid of patches, on which every irrep has a position embedding

EVEN_SQUARE = (32, 32)

GROUP_CASES = {  # a model of each kind, of three blocks, and the groups of its blocks
    f"{kind} {family}": (PREFIXES[variant] + FAMILIES[family], args, groups)
    for family in FAMILIES
    for kind, variant, args, groups in [
        ("c2xc2", "C2xC2", {}, ("c2xc2", "c2xc2", "c2xc2")),
        ("d4", "D4", {}, ("d4", "d4", "d4")),
        ("hybrid of c2xc2", "H-C2xC2", {"num_group_blocks": 2}, ("c2xc2", "c2xc2", "trivial")),
        ("hybrid of d4", "H-D4", {}, ("d4", "trivial", "trivial")),
        ("graded", "D4", {"symmetry": "d4:1,c2xc2:1,c2"}, ("d4", "c2xc2", "c2")),
        ("graded hybrid", "D4", {"symmetry": "d4:1,c2:1,x:1"}, ("d4", "c2", "trivial")),
    ]
}


def small_group_model(case: str, image: tuple[int, int] = SQUARE, **kwargs) -> nn.Module:
    """The small model of a case of `GROUP_CASES`, for a square image."""
    name, args, _ = GROUP_CASES[case]
    return small_model(name, image, **args | kwargs)


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
