"""Products of features and weights, by oneDNN where it takes less time than what torch calls.

For float32 on x86 torch's linear layers call MKL. oneDNN, which torch brings along, is the faster of the two on the
machine where docs/performance.md measured them, but for a start-up of 15 us. torch offers it for compiled, frozen
networks only; here it is an operator of our own, without a gradient.
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEAST = 1 << 24
"""Multiply-adds from which the start-up no longer counts."""
_AVAILABLE = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
_by_onednn = _AVAILABLE


class Linear(nn.Linear):
    """nn.Linear whose product is `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b as F.linear gives it, up to rounding.

    oneDNN makes it in float32 on an x86 CPU, where no gradient is recorded and the product is not small.

    Shape: (..., in_features), (out_features, in_features), (out_features,) -> (..., out_features).
    """
    if is_by_onednn(x, weight):
        return torch.ops.flopeq.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def is_by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN makes this product."""
    return (
        _by_onednn
        and not torch.compiler.is_exporting()  # before the size, which may be a symbol there
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= _LEAST
    )


def set_onednn(enabled: bool) -> None:
    """Lets oneDNN make products, as it does from the start where it can, or leaves all of them to torch."""
    global _by_onednn
    _by_onednn = enabled and _AVAILABLE


torch.library.define(
    "flopeq::linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", tags=torch.Tag.needs_contiguous_strides
)


@torch.library.impl("flopeq::linear", "CPU")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.register_fake("flopeq::linear")
def _linear_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))
