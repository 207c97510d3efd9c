"""How a network is computed, which leaves what it computes alone but for rounding: the switches of `train`."""

from __future__ import annotations

import torch
from timm.layers import set_fused_attn
from torch import nn

from pipeline.config import ConfigError, Train


def settle(settings: Train) -> None:
    """Sets what holds for the whole process, before its models are built: TF32, fused attention."""
    torch.set_float32_matmul_precision("high" if settings.tf32 else "highest")
    set_fused_attn(settings.fused_attention)


def arrange(model: nn.Module, settings: Train) -> nn.Module:
    """The model with its memory format, and its blocks recomputed in the backward pass if that is asked for.

    Raises: ConfigError for a model that cannot recompute.
    """
    if settings.activation_checkpointing:
        try:
            model.set_grad_checkpointing()  # type: ignore[operator]  # timm's, by contract
        except (AttributeError, AssertionError):
            name = type(model).__name__
            raise ConfigError(f"train.activation_checkpointing: {name} cannot; set it to false") from None
    return model.to(memory_format=torch.channels_last) if settings.channels_last else model
