"""Depthwise convolution with a faster kernel gradient for training on a CPU.

oneDNN pads the single channel of each kernel to a block of 16 by 16, so the kernel gradient takes four to five times
longer than necessary. Here the gradient is a sum, which compiles into a loop over the features. It is used in compiled
code only, because the sum is far slower operator by operator.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

_enabled = True


def depthwise_conv2d(x: Tensor, kernel: Tensor, bias: Tensor, padding: int, groups: int) -> Tensor:
    """F.conv2d with one group per channel. In compiled training on a CPU the kernel gradient is a sum.

    The gradient equals that of torch up to rounding.

    Shape: (B, C, H, W), (C, 1, k, k), (C,) -> (B, C, H', W').
    """
    if uses_summed_gradient(x):
        return _SummedGradientConv.apply(x, kernel, bias, padding, groups)
    return F.conv2d(x, kernel, bias, padding=padding, groups=groups)


def uses_summed_gradient(x: Tensor) -> bool:
    """Whether the kernel gradient is computed as a sum for this input."""
    return (
        _enabled
        and torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()  # for which the gradient below has no rules
        and x.device.type == "cpu"
        and x.dtype == torch.float32
    )


def enable_summed_gradient(enabled: bool) -> None:
    """Turns the summed kernel gradient on, which is the default, or leaves the gradient to torch."""
    global _enabled
    _enabled = enabled


class _SummedGradientConv(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, kernel: Tensor, bias: Tensor, padding: int, groups: int) -> Tensor:
        return F.conv2d(x, kernel, bias, padding=padding, groups=groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, kernel, _, ctx.padding, ctx.groups = inputs
        ctx.save_for_backward(x, kernel)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, kernel), pad = grads, ctx.saved_tensors, ctx.padding
        height, width = grad.shape[-2:]
        # The gradient of x does not need x. Passing it makes the compiler save x itself rather than a view of it.
        grad_x, _, _ = torch.ops.aten.convolution_backward(
            grad, x, kernel, None, [1, 1], [pad, pad], [1, 1], False, [0, 0], ctx.groups, [True, False, False]
        )
        # One product per kernel column covers all its rows. The sums are per image, which fits into a core's cache.
        grad_B1HWC = grad.permute(0, 2, 3, 1).unsqueeze(1)
        padded_BHWC = F.pad(x.permute(0, 2, 3, 1), (0, 0, pad, pad, pad, pad))
        rows_BkHWC = padded_BHWC.unfold(1, height, 1).permute(0, 1, 4, 2, 3)
        columns = [
            (rows_BkHWC[..., left : left + width, :] * grad_B1HWC).sum((2, 3)) for left in range(kernel.shape[-1])
        ]
        grad_kernel = rearrange(torch.stack(columns).sum(1), "column row C -> C 1 row column")
        return grad_x, grad_kernel, grad.sum((0, 2, 3)), None, None
