"""Models exported with torch.export and to ONNX give the same logits for any batch size, and keep the law."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flopeq.registry import MODELS
from flopeq.testing import logit_group
from tests.models.conftest import GROUP_CASES, small_group_model, small_model

FLOP_NETWORKS = [info.model for info in MODELS.values() if info.size == "B" and info.variant in ("E", "H")]

NAMES = [
    *FLOP_NETWORKS, "c2xc2 vit", "d4 vit", "d4 resmlp", "d4 convnext_iso", "graded vit", "hybrid of d4 vit"
]  # fmt: skip
"""Names of models, or of cases of `GROUP_CASES`."""


def network(name, **args):
    """A small float32 model with logits of ordinary size."""
    return (small_group_model if name in GROUP_CASES else small_model)(name, (32, 32), **args).float()


@pytest.mark.parametrize("name", NAMES)
def test_torch_export_gives_the_same_logits_for_any_batch(name):
    model = network(name)
    exported = torch.export.export(
        model, (torch.randn(3, 3, 32, 32),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
    ).module()
    for batch in (2, 5):
        images = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(exported(images), model(images))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("flophybrid_", "hybrid"))])
def test_onnx_gives_the_same_logits_for_any_batch(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    one_block = {"num_blocks" if "resmlp" in name else "depth": 1}
    model = network(name, **({} if name.startswith("graded") else one_block))
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (torch.randn(3, 3, 32, 32),), path, dynamo=True, verbose=False, input_names=["images"],
        output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (2, 5):
        images = torch.randn(batch, 3, 32, 32)
        [logits] = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(logits, model(images).numpy(), rtol=1e-3, atol=1e-4)
    for g in logit_group(model).elements:
        [of_g] = session.run(None, {"images": g(images).contiguous().numpy()})
        np.testing.assert_allclose(of_g, logits, rtol=1e-3, atol=1e-4)
