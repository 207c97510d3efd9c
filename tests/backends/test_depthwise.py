"""Depthwise convolutions with a summed kernel gradient: equal to torch's, and used only where it applies."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from flopeq.backends import depthwise
from flopeq.models.build import build
from flopeq.testing import relative_error
from tests.models.conftest import SMALL, randomize_parameters


@pytest.fixture(autouse=True)
def _restore_switch():
    torch._dynamo.reset()
    yield
    depthwise.enable_summed_gradient(True)


def convolve(x, kernel, bias):
    return depthwise.depthwise_conv2d(x, kernel, bias, kernel.shape[-1] // 2, len(kernel))


def operands(shape=(2, 12, 6, 5), size=7, dtype=torch.float32):
    channels = shape[1]
    tensors = torch.randn(shape), torch.randn(channels, 1, size, size), torch.randn(channels)
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def gradients(function, tensors):
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    return torch.autograd.grad(function(*tensors).tanh().square().sum(), wanted)


def in_float64(tensors):
    return [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]


def backward_operators(function, *args) -> str:
    """The operators of a compiled backward pass."""
    seen = []

    def note(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=note)
    torch.compile(function, backend=backend)(*args).sum().backward()
    return " ".join(seen)


@pytest.mark.parametrize("shape, size", [
    ((2, 12, 6, 5), 7), ((1, 4, 2, 3), 7), ((3, 33, 14, 14), 7), ((2, 20, 9, 4), 3), ((2, 8, 1, 1), 5),
])  # fmt: skip
def test_gradients_equal_those_of_torch(shape, size):
    tensors = operands(shape, size)
    if size == 7:  # as the network has it
        tensors[0] = tensors[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    found = gradients(torch.compile(convolve, fullgraph=True), tensors)
    plain = gradients(convolve, tensors)
    for by_sums, by_torch, exact in zip(found, plain, gradients(convolve, in_float64(tensors)), strict=True):
        assert by_sums.shape == exact.shape and by_sums.dtype == torch.float32
        assert relative_error(by_sums.double(), exact) < 2 * relative_error(by_torch.double(), exact) + 1e-6


@pytest.mark.parametrize("learns", [(True, False, False), (False, True, False), (False, False, True)])
def test_frozen_tensors_get_no_gradient(learns):
    tensors = [tensor.requires_grad_(yes) for tensor, yes in zip(operands(), learns, strict=True)]
    (found,) = gradients(torch.compile(convolve, fullgraph=True), tensors)
    (exact,) = gradients(convolve, in_float64(tensors))
    assert relative_error(found.double(), exact) < 1e-5


def test_another_batch_size_does_not_recompile():
    compiled = torch.compile(convolve, fullgraph=True, dynamic=True)
    for batch in (2, 5):
        tensors = operands((batch, 12, 6, 5))
        for found, exact in zip(gradients(compiled, tensors), gradients(convolve, in_float64(tensors)), strict=True):
            assert relative_error(found.double(), exact) < 1e-5


def test_compiled_backward_uses_sums_until_disabled():
    tensors = operands()
    assert "unfold" in backward_operators(convolve, *tensors)
    depthwise.enable_summed_gradient(False)
    torch._dynamo.reset()
    assert "unfold" not in backward_operators(convolve, *tensors)


@pytest.mark.parametrize("case", [
    "compiled", "not compiled", "exported", "without gradients", "autocast", "float64", "bfloat16", "meta",
    "switched off",
])  # fmt: skip
def test_the_summed_gradient_applies_only_to_compiled_float32_training(case, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: case != "not compiled")
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: case == "exported")
    depthwise.enable_summed_gradient(case != "switched off")
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(case, torch.float32)
    x = torch.zeros(1, 4, 3, 3, dtype=dtype, device="meta" if case == "meta" else "cpu")
    with torch.set_grad_enabled(case != "without gradients"), torch.autocast("cpu", enabled=case == "autocast"):
        assert depthwise.uses_summed_gradient(x) == (case == "compiled")


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_network_trains_the_same_with_the_summed_gradient(checkpointed):
    images_BCHW = torch.randn(3, 3, 32, 32)
    model = randomize_parameters(
        build("flophybrid_convnext_iso_small", **SMALL["convnext_iso"], img_size=32, patch_size=8)
    ).train()
    model.set_grad_checkpointing(checkpointed)
    found = []
    for enabled in (True, False):
        depthwise.enable_summed_gradient(enabled)
        torch._dynamo.reset()
        model.zero_grad()
        torch.compile(model, backend="aot_eager")(images_BCHW).square().mean().backward()
        found.append({name: weight.grad for name, weight in model.named_parameters()})
    assert set(found[0]) == set(found[1])
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-4, atol=1e-6, msg=name)
