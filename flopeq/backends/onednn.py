"""Linear layers computed by oneDNN where it is faster than torch's default.

For float32 on x86, torch's linear layers call MKL. oneDNN, which torch includes, is faster on the machine of
docs/performance.md, except for a start-up cost of 15 us per call. torch uses oneDNN for compiled, frozen networks only.
Here it is a custom operator without a gradient. Only compiled inference uses it, because tools that look at a network
operator by operator do not know the operator.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import flop_registry, register_flop_formula

from flopeq.backends.attached import may_use_weights

_MIN_MULTIPLY_ADDS = 1 << 24
"""Multiply-adds from which the start-up cost is negligible."""

_AVAILABLE = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()

_enabled = _AVAILABLE


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x) for a linear layer, up to rounding.

    oneDNN computes it in compiled float32 inference on an x86 CPU if the product is not small and nothing is attached
    to the layer. Otherwise the layer is called.

    Shape: (..., in_features) -> (..., out_features).
    """
    if uses_onednn(layer, x):
        return torch.ops.flopeq.linear(x, layer.weight, layer.bias)
    return layer(x)


def linear_without_bias(layer: nn.Linear, x: Tensor) -> Tensor:
    """W x for a layer whose weights the caller may use (`may_use_weights`), computed as by `linear`."""
    if uses_onednn(layer, x):
        return torch.ops.flopeq.linear(x, layer.weight, None)
    return F.linear(x, layer.weight)


def uses_onednn(layer: nn.Linear, x: Tensor) -> bool:
    """Whether oneDNN computes layer(x)."""
    return (
        _enabled
        and torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()  # checked before the size, which may be symbolic in an export
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and x.device.type == "cpu"
        and may_use_weights(layer)
        and x.dtype == layer.weight.dtype == torch.float32
        and x.numel() * len(layer.weight) >= _MIN_MULTIPLY_ADDS
    )


def enable_onednn(enabled: bool) -> None:
    """Turns oneDNN on, which is the default if it is available, or leaves all products to torch."""
    global _enabled
    _enabled = enabled and _AVAILABLE


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


def _count_flops(x_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Operations in the convention of torch.utils.flop_counter: 2 for a multiply-add."""
    return 2 * torch.Size(x_shape).numel() * weight_shape[0]


if not hasattr(torch.ops.flopeq, "linear"):  # an operator can be defined only once, even if this module is reloaded
    torch.library.define(
        "flopeq::linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", tags=torch.Tag.needs_contiguous_strides
    )
    torch.library.impl("flopeq::linear", "CPU", _linear)
    torch.library.register_fake("flopeq::linear", _linear_fake)
if torch.ops.flopeq.linear not in flop_registry:
    register_flop_formula(torch.ops.flopeq.linear)(_count_flops)
