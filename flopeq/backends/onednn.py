"""Linear layers that call oneDNN where it is faster than torch's default.

For float32 on x86, torch's linear layers call MKL. oneDNN, which torch includes, is faster on the machine of
docs/performance.md, except for a start-up cost of 15 us per call. torch uses oneDNN for compiled, frozen networks only.
Here it is a custom operator without a gradient.
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MIN_MULTIPLY_ADDS = 1 << 24
"""Multiply-adds from which the start-up cost is negligible."""

_AVAILABLE = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()

_enabled = _AVAILABLE


class Linear(nn.Linear):
    """nn.Linear that computes its result with `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, equal to F.linear up to rounding.

    oneDNN computes it in float32 on an x86 CPU if no gradient is recorded and the product is not small.

    Shape: (..., in_features), (out_features, in_features), (out_features,) -> (..., out_features).
    """
    if uses_onednn(x, weight):
        return torch.ops.flopeq.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes this product."""
    return (
        _enabled
        and not torch.compiler.is_exporting()  # checked before the size, which may be symbolic in an export
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= _MIN_MULTIPLY_ADDS
    )


def enable_onednn(enabled: bool) -> None:
    """Turns oneDNN on, which is the default if it is available, or leaves all products to torch."""
    global _enabled
    _enabled = enabled and _AVAILABLE


torch.library.define(
    "flopeq::linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", tags=torch.Tag.needs_contiguous_strides
)


@torch.library.impl("flopeq::linear", "CPU")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.register_fake("flopeq::linear")
def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))
