"""Depthwise convolution, for training on a CPU with a faster gradient of its kernels.

oneDNN pads each kernel's one channel to a block of 16 by 16, and so takes four to five times as long for their gradient
as it needs. Written as sums it compiles into a loop over the features. Only compiled: run operator by operator, the
sums would take far longer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

_by_sums = True


def depthwise_conv2d(x: Tensor, kernel: Tensor, bias: Tensor, padding: int, groups: int) -> Tensor:
    """F.conv2d of as many groups as channels; in training on a CPU its kernel's gradient is the same up to rounding.

    Shape: (B, C, H, W), (C, 1, k, k), (C,) -> (B, C, H', W').
    """
    if is_by_sums(x):
        return _BySums.apply(x, kernel, bias, padding, groups)
    return F.conv2d(x, kernel, bias, padding=padding, groups=groups)


def is_by_sums(x: Tensor) -> bool:
    """Whether the kernel's gradient is made by sums."""
    return (
        _by_sums
        and torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and x.device.type == "cpu"
        and x.dtype == torch.float32
    )


def set_sums(enabled: bool) -> None:
    """Lets the kernels' gradient be made by sums, as it is from the start where it can, or leaves it to torch."""
    global _by_sums
    _by_sums = enabled


class _BySums(torch.autograd.Function):
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
        # Given x, which it does not need, so that the compiler keeps x as it is and not some view of it.
        grad_x, _, _ = torch.ops.aten.convolution_backward(
            grad, x, kernel, None, [1, 1], [pad, pad], [1, 1], False, [0, 0], ctx.groups, [True, False, False]
        )
        # For each column of the kernel all its rows at once; image by image, since one image fits a core's cache.
        grad_B1HWC = grad.permute(0, 2, 3, 1).unsqueeze(1)
        padded_BHWC = F.pad(x.permute(0, 2, 3, 1), (0, 0, pad, pad, pad, pad))
        rows_BkHWC = padded_BHWC.unfold(1, height, 1).permute(0, 1, 4, 2, 3)
        columns = [
            (rows_BkHWC[..., left : left + width, :] * grad_B1HWC).sum((2, 3)) for left in range(kernel.shape[-1])
        ]
        grad_kernel = rearrange(torch.stack(columns).sum(1), "column row C -> C 1 row column")
        return grad_x, grad_kernel, grad.sum((0, 2, 3)), None, None
