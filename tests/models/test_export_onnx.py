"""Models exported with torch.export and to ONNX give the same logits for any batch size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flopeq.registry import MODELS
from tests.models.conftest import small_model

SIZES = [info for info in MODELS.values() if info.size == "B" and info.variant != "X"]

NAMES = [info.model for info in SIZES]


def network(name):
    """A small float32 model with logits of ordinary size."""
    return small_model(name, (32, 32)).float()


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
@pytest.mark.parametrize("name", [info.model for info in SIZES if info.variant in ("E", "H-C2xC2", "D4")])
def test_onnx_gives_the_same_logits_for_any_batch(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = network(name)
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
