"""The settings of `train` that change speed and memory but not results, apart from rounding."""

from __future__ import annotations

import torch
from timm.layers import set_fused_attn
from torch import nn

from pipeline.base.errors import ConfigError
from pipeline.base.schema import Train


def apply_backend_settings(settings: Train) -> None:
    """Sets TF32 and fused attention for the whole process. Call it before building models."""
    torch.set_float32_matmul_precision("high" if settings.tf32 else "highest")
    set_fused_attn(settings.fused_attention)


def apply_model_settings(model: nn.Module, settings: Train) -> nn.Module:
    """Applies the memory format and, if enabled, activation checkpointing. Returns the model.

    Raises: ConfigError if the model does not support activation checkpointing.
    """
    if settings.activation_checkpointing:
        try:
            model.set_grad_checkpointing()  # type: ignore[operator]  # timm's, by contract
        except (AttributeError, AssertionError):
            name = type(model).__name__
            raise ConfigError(f"train.activation_checkpointing: {name} does not support it; set it to false") from None
    return model.to(memory_format=torch.channels_last) if settings.channels_last else model
