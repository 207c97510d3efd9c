"""Depthwise convolutions, whose kernel's gradient oneDNN is slow to give.

It pads every group of one channel to a block of 16 by 16. Where a training step is compiled for a CPU, the gradient is
written out as a sum for each place of the kernel, which the compiler makes one pass over the features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx


def depthwise_conv2d(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """Each channel by a kernel of its own, padded to keep the grid, as F.conv2d gives it.

    Shape: (B, C, H, W), (C, 1, k, k) with k odd, (C,) -> (B, C, H, W).
    """
    if has_written_out_gradient(x):
        return _DepthwiseConv2d.apply(x, kernel, bias)
    return F.conv2d(x, kernel, bias, padding=kernel.shape[-1] // 2, groups=len(kernel))


def has_written_out_gradient(x: Tensor) -> bool:
    """Whether the kernel's gradient is written out."""
    return (
        torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and x.device.type == "cpu"
        and x.dtype == torch.float32
    )


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernel)
        return F.conv2d(x, kernel, bias, padding=kernel.shape[-1] // 2, groups=len(kernel))

    @staticmethod
    def backward(ctx, grad):
        x, kernel = ctx.saved_tensors
        size = kernel.shape[-1]
        pad = size // 2
        grad_x = torch.ops.aten.convolution_backward(
            grad, x, kernel, None, [1, 1], [pad, pad], [1, 1], False, [0, 0], len(kernel), [True, False, False]
        )[0]
        height, width = x.shape[-2:]
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, pad, pad, pad, pad))
        grad_BHWC = grad.permute(0, 2, 3, 1)
        sums = [
            (padded[:, row : row + height, column : column + width] * grad_BHWC).sum((0, 1, 2))
            for row in range(size)
            for column in range(size)
        ]
        grad_kernel = torch.stack(sums, dim=-1).view(kernel.shape)
        return grad_x, grad_kernel, grad_BHWC.sum((0, 1, 2))
