"""Linear layers with oneDNN: equal to torch's, and used only where they apply."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

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


def operands(tokens: int, inner: int, outer: int, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    return torch.randn(tokens, inner, dtype=dtype, device=device), torch.randn(outer, inner, dtype=dtype, device=device)


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
    with torch.no_grad():
        assert onednn.uses_onednn(x, weight)
        found = onednn.linear(x, weight, b)
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    assert found.shape == exact.shape and found.dtype == torch.float32 and found.is_contiguous()
    assert relative_error(found.double(), exact) < 2 * relative_error(F.linear(x, weight, b).double(), exact) + 1e-6


@needs_onednn
def test_the_operator_has_a_fake_implementation():
    x, weight = operands(*LARGE)
    for bias in (torch.randn(LARGE[2]), None):
        torch.library.opcheck(torch.ops.flopeq.linear.default, (x, weight, bias),
                              test_utils=("test_schema", "test_faketensor"))  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("case", [
    "gradients", "small", "float64", "bfloat16", "autocast", "meta", "exported", "switched off",
])  # fmt: skip
def test_torch_computes_all_other_products(case):
    """The result is bit-identical to F.linear."""
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(case, torch.float32)
    size = (60, 192, 768) if case == "small" else LARGE
    x, weight = operands(*size, dtype=dtype, device="meta" if case == "meta" else "cpu")
    layer = onednn.Linear(size[1], size[2], bias=False, device=x.device, dtype=dtype)
    layer.weight.copy_(weight)
    onednn.enable_onednn(case != "switched off")
    if case == "exported":
        targets = [str(node.target) for node in torch.export.export(layer, (x,)).graph.nodes]
        assert not any("flopeq" in target for target in targets) and any("linear" in target for target in targets)
    else:
        with torch.set_grad_enabled(case == "gradients"), torch.autocast("cpu", enabled=case == "autocast"):
            assert not onednn.uses_onednn(x, weight)
            found, expected = layer(x), F.linear(x, weight)
        assert found.requires_grad == (case == "gradients") and found.dtype == expected.dtype
        assert case == "meta" or torch.equal(found, expected)


@needs_onednn
@torch.no_grad()
@pytest.mark.parametrize("name, family", [
    ("flop_deit3_small_patch16_224", "vit"), ("flophybrid_deit3_small_patch16_224", "vit"),
    ("flop_resmlp_24_224", "resmlp"), ("flop_convnext_iso_small", "convnext_iso"),
])  # fmt: skip
def test_a_network_gives_the_same_logits_with_onednn(name, family, monkeypatch):
    monkeypatch.setattr(onednn, "_MIN_MULTIPLY_ADDS", 0)
    model = randomize_parameters(build(name, **SMALL[family], img_size=32, patch_size=8)).eval()
    images_BCHW, made = torch.randn(2, 3, 32, 32), []
    monkeypatch.setattr(onednn, "uses_onednn", lambda *operands, ask=onednn.uses_onednn:
                        made.append(ask(*operands)) or made[-1])  # fmt: skip
    found = model(images_BCHW)
    assert made and all(made)
    onednn.enable_onednn(False)
    torch.testing.assert_close(found, model(images_BCHW), rtol=1e-4, atol=1e-5)
    assert not any(made[len(made) // 2 :])


@needs_onednn
@torch.no_grad()
def test_compiled_code_calls_the_same_operator():
    layer = onednn.Linear(192, 768).eval()
    x = torch.randn(600, 192)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    few_rows = x[:10]  # `uses_onednn` is False for this size
    torch.testing.assert_close(compiled(few_rows), layer(few_rows))
