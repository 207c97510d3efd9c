"""Linear layers with oneDNN: equal to torch's, and used only in compiled inference of layers with nothing attached."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import jvp
from torch.utils.flop_counter import FlopCounterMode

from flopeq.backends import onednn
from flopeq.models.build import build
from flopeq.testing import relative_error
from tests.models.conftest import SMALL, randomize_parameters

needs_onednn = pytest.mark.skipif(not onednn._enabled, reason="needs oneDNN on an x86 CPU")

LARGE = (600, 192, 768)  # tokens, in_features, out_features: 88 million multiply-adds


@pytest.fixture(autouse=True)
def _restore_switch():
    yield
    onednn.enable_onednn(True)


def operands(tokens: int, inner: int, outer: int):
    return torch.randn(tokens, inner), torch.randn(outer, inner)


class Layer(nn.Module):
    """A linear layer that is computed by `onednn.linear`."""

    def __init__(self, inner: int, outer: int, **kwargs) -> None:
        super().__init__()
        self.inner = nn.Linear(inner, outer, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return onednn.linear(self.inner, x)


def compile_and_count(function, *inputs):
    """The result of the compiled function, and the number of oneDNN's products in its graph."""
    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    result = compiled(*inputs)
    nodes = [node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    return result, sum("flopeq.linear" in str(node.target) for node in nodes)


@needs_onednn
@pytest.mark.parametrize("tokens, inner, outer", [LARGE, (997, 131, 257), (1, 8192, 4096), (70000, 16, 16)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "half of a tensor", "in two axes", "transposed"])
def test_values_equal_those_of_torch(tokens, inner, outer, bias, layout):
    x, weight = operands(tokens, inner, outer)
    x = {
        "contiguous": x,
        "half of a tensor": torch.cat((x, x), dim=-1).chunk(2, -1)[1],
        "in two axes": x[None],
        "transposed": x.T.contiguous().T,
    }[layout]
    b = torch.randn(outer) if bias else None
    found = torch.ops.flopeq.linear(x, weight, b)
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    assert found.shape == exact.shape and found.dtype == torch.float32 and found.is_contiguous()
    assert relative_error(found.double(), exact) < 2 * relative_error(F.linear(x, weight, b).double(), exact) + 1e-6


@needs_onednn
def test_the_operator_has_a_fake_implementation():
    x, weight = operands(*LARGE)
    for bias in (torch.randn(LARGE[2]), None):
        torch.library.opcheck(torch.ops.flopeq.linear.default, (x, weight, bias),
                              test_utils=("test_schema", "test_faketensor"))  # fmt: skip


@needs_onednn
def test_torchs_counter_knows_the_operator():
    x, weight = operands(*LARGE)
    counts = []
    for product in (torch.ops.flopeq.linear, F.linear):
        with FlopCounterMode(display=False) as counter:
            product(x, weight, None)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 600 * 192 * 768] * 2


def test_the_module_can_be_reloaded():
    importlib.reload(onednn)
    x, weight = operands(*LARGE)
    assert torch.ops.flopeq.linear(x, weight, None).shape == (600, 768)


@needs_onednn
@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_compiled_inference_calls_the_operator(bias):
    layer, x = Layer(192, 768, bias=bias), torch.randn(600, 192)
    found, products = compile_and_count(layer, x)
    assert products == 1
    torch.testing.assert_close(found, layer(x))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


class Doubled(nn.Linear):
    """A layer that does more than its weights say."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def attach(case: str, layer: nn.Module) -> None:
    """Makes a layer return twice its result in one of the ways in which tools attach themselves."""
    if case == "hook":
        layer.inner.register_forward_hook(lambda module, args, result: 2 * result)
    elif case == "pre-hook":
        layer.inner.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    elif case == "replaced forward":
        forward = layer.inner.forward
        layer.inner.forward = lambda x: 2 * forward(x)
    elif case == "subclass":
        layer.inner.__class__ = Doubled
    elif case == "parametrization":
        nn.utils.parametrize.register_parametrization(layer.inner, "weight", Double())


class Double(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@torch.no_grad()
@pytest.mark.parametrize("case", ["hook", "pre-hook", "replaced forward", "subclass", "parametrization"])
def test_a_layer_with_something_attached_is_called(case):
    layer, x = Layer(192, 768, bias=False), torch.randn(600, 192)
    expected = 2 * layer(x)
    attach(case, layer)
    found, products = compile_and_count(layer, x)
    assert products == 0
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("case", ["gradients", "small", "float64", "bfloat16", "autocast", "meta", "switched off"])
def test_torch_computes_all_other_products(case):
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(case, torch.float32)
    tokens, inner, outer = (60, 192, 768) if case == "small" else LARGE
    where = {"device": "meta" if case == "meta" else "cpu", "dtype": dtype}
    layer, x = Layer(inner, outer, **where), torch.randn(tokens, inner, **where)
    onednn.enable_onednn(case != "switched off")
    with torch.set_grad_enabled(case == "gradients"), torch.autocast("cpu", enabled=case == "autocast"):
        found, products = compile_and_count(layer, x)
        assert products == 0
        assert found.requires_grad == (case == "gradients")
        if case != "meta":
            torch.testing.assert_close(found, layer.inner(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@torch.no_grad()
@pytest.mark.parametrize("case", ["eager", "exported", "traced"])
def test_only_compiled_code_uses_the_operator(case):
    layer, x = Layer(192, 768), torch.randn(600, 192)
    if case == "eager":
        assert not onednn.uses_onednn(layer.inner, x)
    elif case == "exported":
        exported = torch.export.export(layer, (x,))
        assert "flopeq" not in str(exported.graph) and torch.equal(exported.module()(x), layer(x))
    else:
        traced = torch.jit.trace(layer, x)
        assert "flopeq" not in str(traced.inlined_graph) and torch.equal(traced(x), layer(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # jvp itself uses torch.jit.script
@torch.no_grad()
def test_forward_mode_derivatives_are_right_without_gradients():
    layer = Layer(192, 768)
    x, tangent = torch.randn(600, 192), torch.randn(600, 192)
    expected = F.linear(tangent, layer.inner.weight)

    def by_dual_numbers(x, tangent):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent

    for derivative in (lambda x, tangent: jvp(layer, (x,), (tangent,))[1], by_dual_numbers):
        torch.testing.assert_close(derivative(x, tangent), expected)
        found, products = compile_and_count(derivative, x, tangent)
        assert products == 0
        torch.testing.assert_close(found, expected)


@needs_onednn
@torch.no_grad()
@pytest.mark.parametrize("name, family, products", [
    ("flop_deit3_small_patch16_224", "vit", 24), ("flophybrid_deit3_small_patch16_224", "vit", 8),
    ("flop_resmlp_24_224", "resmlp", 24), ("flop_convnext_iso_small", "convnext_iso", 11),
])  # fmt: skip
def test_a_compiled_network_gives_the_same_logits_with_onednn(name, family, products, monkeypatch):
    monkeypatch.setattr(onednn, "_MIN_MULTIPLY_ADDS", 0)
    args = SMALL[family] if name != "flop_resmlp_24_224" else SMALL[family] | {"num_blocks": 3}
    model = randomize_parameters(build(name, **args, img_size=32, patch_size=8)).eval()
    images_BCHW = torch.randn(2, 3, 32, 32)
    found, by_onednn = compile_and_count(model, images_BCHW)
    assert by_onednn == products
    torch.testing.assert_close(found, model(images_BCHW), rtol=1e-4, atol=1e-5)
    onednn.enable_onednn(False)
    assert compile_and_count(model, images_BCHW)[1] == 0
