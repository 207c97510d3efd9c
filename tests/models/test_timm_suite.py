"""timm's own tests/test_models.py on our models, for who has timm's sources: FLOPEQ_TIMM_CHECKOUT names the folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.timm_suite import SIZE

CHECKOUT = os.environ.get("FLOPEQ_TIMM_CHECKOUT")

# torch has deprecated TorchScript, and timm excludes models from these tests, too (EXCLUDE_JIT_FILTERS).
EXCLUDED_TESTS = ("test_model_forward_torchscript", "test_model_forward_fx_torchscript")

REPLACED = {
    # With num_classes=0, E gives what its head sees: the invariant half of num_features, or those and |odd|.
    "\n    assert outputs.shape[feat_dim] == model.num_features\n": (
        "\n    assert outputs.shape[feat_dim] == model.head_hidden_size\n"
        "    assert any(name in model_name for name in ('flop_', 'mirrors_', 'octic_')) or "
        "outputs.shape[feat_dim] == model.num_features\n"
    ),
    # The kernel of the first convolution is mirrored: its parameters are the free values of one kernel for each irrep.
    """        assert fc + ".weight" in state_dict.keys(), """: (
        """        assert any(fc + name in state_dict.keys() for name in (".weight", ".even", ".ee", ".a1")), """
    ),
}
"""Assertions of timm's file that differ for equivariant networks and hybrids."""

MARKERS = "base cfg torchscript features fxforward fxbackward timeout"


@pytest.mark.slow
@pytest.mark.skipif(not CHECKOUT, reason="FLOPEQ_TIMM_CHECKOUT does not name a checkout of timm")
@pytest.mark.parametrize("size", "TSBLH")
def test_timms_tests_pass_on_our_models(size: str, root: Path, tmp_path: Path) -> None:
    text = (Path(str(CHECKOUT)) / "tests" / "test_models.py").read_text(encoding="utf-8")
    for old, new in REPLACED.items():
        assert old in text, f"timm's file no longer has {old!r}"
        text = text.replace(old, new)
    (tmp_path / "test_timm_models.py").write_text(text, encoding="utf-8")
    markers = "".join(f"\n    {marker}" for marker in MARKERS.split())
    (tmp_path / "pytest.ini").write_text(f"[pytest]\nmarkers ={markers}\n", encoding="utf-8")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.models.timm_suite",
             "-k", "(flop or mirrors or octic or convnext_iso or resmlp) and not " + " and not ".join(EXCLUDED_TESTS),
             "--tb=short", str(tmp_path)]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(root), SIZE: size}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 10, done.stdout[-2000:]
