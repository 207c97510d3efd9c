"""Counts the operations of one forward pass, in the convention of the paper's Table 1.

Bökman et al. 2025 (appendix B) count with fvcore and add handlers for element-wise operations. Counts per image:

| operation                                                        | counts                               |
| ---------------------------------------------------------------- | ------------------------------------ |
| linear layers, convolutions, matrix products                     | 1 per multiply-add, bias free        |
| additions, products, quotients, signs, means, sums               | 1 per element                        |
| variances                                                        | 2 per element (see below)            |
| square roots, exponentials, sigmoids                             | 4 per element                        |
| softmax, powers, layer norm with weights                         | 5 per element (layer norm without 4) |
| GELU                                                             | 8 per element                        |
| attention, fused or not                                          | its two products, scaling, softmax   |
| copies, flips, gathers, concatenations, comparisons, max, ReLU   | 0                                    |

Departs: here a variance costs 2 for every element, because every element takes part in it. The authors' counter
charges the 2 for one row of the whole batch, where it is negligible. The difference is at most 0.15% and changes no
printed digit.

The counter traces the reference layers at batch 1 and leaves out work whose result is not used. It runs on the
model's device. On the meta device a huge model takes seconds and no memory.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

with warnings.catch_warnings():  # fvcore scripts a loss on import, and torch warns that scripting is deprecated
    warnings.simplefilter("ignore")
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import get_shape

from flopeq.backends.attached import ignore_hooks

OpHandle = Callable[[list[Any], list[Any]], Any]
"""Function that counts an operation, given the inputs and outputs of its node in the trace."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Complexity:
    """Number of parameters and operations per image, where `flops = macs + elementwise`."""

    params: int
    flops: int
    macs: int
    elementwise: int


@torch.no_grad()
def complexity(model: nn.Module, image_size: tuple[int, int, int]) -> Complexity:
    """Counts the parameters, and the operations for one image of shape `image_size`, (C, H, W), in evaluation mode.

    An operation without a stated cost counts 1 per element of its result, and a warning names it.
    """
    like = next(model.parameters(), torch.empty(0))
    image_BCHW = torch.zeros(1, *image_size, device=like.device, dtype=like.dtype)
    counts, unknown = count_operations(model, image_BCHW)
    if unknown:
        log.warning("no cost is stated for %s: counting 1 per element of the result", ", ".join(unknown))
    macs = sum(count for name, count in counts.items() if name in MULTIPLY_ADDS)
    flops = sum(counts.values())
    params = sum(parameter.numel() for parameter in model.parameters())
    return Complexity(params, flops, macs, flops - macs)


def count_operations(model: nn.Module, images_BCHW: torch.Tensor) -> tuple[dict[str, int], list[str]]:
    """Operations by kind, and the kinds without a stated cost, which count 1 per element of the result."""
    with _eval_mode(model), ignore_hooks(), _RecordedConvolutions():  # fvcore's hooks name the modules
        counter = _counter(model, images_BCHW)
        counter.by_operator()
        unknown = sorted(counter.unsupported_ops())
        if unknown:
            counter.set_op_handle(**{kind: _per_result(1) for kind in unknown})
        return {name: round(count) for name, count in counter.by_operator().items()}, unknown


def _counter(model: nn.Module, images_BCHW: torch.Tensor) -> FlopCountAnalysis:
    counter = FlopCountAnalysis(model, images_BCHW)
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    for cost, operations in _COST_PER_RESULT.items():
        counter.set_op_handle(**{f"aten::{name}": _per_result(cost) for name in operations})
    for cost, operations in _COST_PER_INPUT.items():
        counter.set_op_handle(**{f"aten::{name}": _per_input(cost) for name in operations})
    counter.set_op_handle(
        **{
            "aten::_convolution_mode": _convolution_by_name,
            "aten::baddbmm": _batched_matmul,
            "aten::scaled_dot_product_attention": _attention,
        }
    )
    return counter


MULTIPLY_ADDS = frozenset({"conv", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "attention_products"})
"""The kinds of operation that consist of multiply-adds."""

# fmt: off
_COST_PER_RESULT = {
    0: ("abs", "adaptive_max_pool2d", "amax", "ceil", "clamp_min", "clone", "dropout_", "expand_as", "eye",
        "feature_dropout", "flip", "hardtanh", "hstack", "im2col", "index_select", "mT", "max_pool2d",
        "meshgrid", "movedim", "one_hot", "ones_like", "pad", "repeat", "repeat_interleave", "reshape_as", "rot90",
        "tile", "unflatten", "where"),
    1: ("add", "add_", "div", "div_", "leaky_relu", "leaky_relu_", "mul", "mul_", "neg", "reciprocal", "rsub", "sign",
        "square", "sub", "sub_"),
    2: ("addcdiv", "addcmul", "lerp"),
    4: ("cos", "elu", "exp", "hardsigmoid", "hardsigmoid_", "log", "rms_norm", "rsqrt", "sigmoid", "sigmoid_",
        "sin", "sqrt", "tanh"),
    5: ("hardswish", "hardswish_", "log_softmax", "pow", "silu", "silu_", "softmax"),
    8: ("gelu", "gelu_", "mish", "softplus"),
}
# fmt: on
"""Operations by cost per element of the result."""

_COST_PER_INPUT = {
    1: ("avg_pool1d", "avg_pool2d", "cumsum", "linalg_vector_norm", "mean", "norm", "sum"),
    2: ("var",),
    3: ("var_mean",),
}
"""Reductions by cost per element of the input."""


def _size(value: Any) -> int:
    """Number of elements of a tensor; 0 for any other value."""
    shape = get_shape(value)
    return 0 if shape is None else prod(shape)


def _shape(value: Any) -> list[int]:
    shape = get_shape(value)
    assert shape is not None
    return shape


def _per_result(cost: int) -> OpHandle:
    return lambda inputs, outputs: cost * _size(outputs[0])


def _per_input(cost: int) -> OpHandle:
    return lambda inputs, outputs: cost * _size(inputs[0])


def _convolution_by_name(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Counts a convolution whose padding is "same" or "valid"."""
    weight, result = _shape(inputs[1]), _shape(outputs[0])
    return Counter({"conv": prod(weight) * result[0] * prod(result[2:])})


def _batched_matmul(inputs: list[Any], outputs: list[Any]) -> int:
    return _size(outputs[0]) * _shape(inputs[1])[-1]


def _attention(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Counts softmax(q k^T / sqrt d) v operation by operation, for q (..., N, d), k (..., M, d), v (..., M, e)."""
    q, k, v = (_shape(value) for value in inputs[:3])
    pairs = prod(q[:-1]) * k[-2]
    masked = get_shape(inputs[3]) is not None
    return Counter(
        {
            "attention_products": pairs * (q[-1] + v[-1]),
            "attention_softmax": prod(q) + pairs * (5 + masked),
        }
    )


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _RecordedConvolutions(TorchFunctionMode):
    """Makes the tracer record convolutions on the meta device, where it does not record torch.conv2d."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS:
            return _convolve(func, _CONVOLUTIONS[func], *args, **kwargs)
        if func in _TRANSPOSED_CONVOLUTIONS:
            return _convolve_transposed(_TRANSPOSED_CONVOLUTIONS[func], *args, **kwargs)
        return func(*args, **kwargs)


_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}

_TRANSPOSED_CONVOLUTIONS = {torch.conv_transpose1d: 1, torch.conv_transpose2d: 2, torch.conv_transpose3d: 3}


def _convolve(
    func: Any, dims: int, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> torch.Tensor:  # fmt: skip
    if isinstance(padding, str):  # the tracer records these on the meta device too
        return func(input, weight, bias, stride, padding, dilation, groups)
    stride, padding, dilation = (_per_axis(size, dims) for size in (stride, padding, dilation))
    return torch._convolution(
        input, weight, bias, stride, padding, dilation, False, [0] * dims, groups, *_CUDNN_SWITCHES
    )


def _convolve_transposed(
    dims: int, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
    stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> torch.Tensor:  # fmt: skip
    stride, padding, dilation, output_padding = (
        _per_axis(size, dims) for size in (stride, padding, dilation, output_padding)
    )
    return torch._convolution(
        input, weight, bias, stride, padding, dilation, True, output_padding, groups, *_CUDNN_SWITCHES
    )


_CUDNN_SWITCHES = (False, False, False, False)


def _per_axis(size: Any, dims: int) -> list[int]:
    return [size] * dims if isinstance(size, int) else list(size)
