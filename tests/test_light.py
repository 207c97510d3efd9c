"""The library alone: what importing it costs, and that it needs nothing of the pipeline's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# What timm itself imports (yaml among it) is there wherever timm is.
PIPELINE_ONLY = (
    "ray", "mlflow", "dvc", "webdataset", "simplejpeg", "xxhash", "pyarrow", "psutil", "pydantic", "scipy", "pandas",
    "sklearn", "matplotlib", "jinja2", "s3fs", "onnx", "onnxscript", "onnxruntime", "pipeline", "stages",
)  # fmt: skip


def python(root, code, **env) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_library_runs_without_what_only_the_pipeline_needs(root):
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {PIPELINE_ONLY!r}:
            raise ImportError(name + " is not installed")
sys.meta_path.insert(0, Refuse())
from flopeq import benchmark, card, cli, comparison, convert, flops, profiling, testing
for words in (["list"], ["complexity", "flop_deit3_small_patch16_224", "img_size=32", "depth=1"]):
    try:
        cli.main(words)
    except SystemExit as stop:
        assert stop.code == 0
"""
    assert "flop_deit3_small_patch16_224" in python(root, code)


def test_importing_flopeq_adds_little_to_importing_timm(root):
    code = "import time, timm; start = time.perf_counter(); import flopeq; print(time.perf_counter() - start)"
    assert min(float(python(root, code)) for _ in range(2)) < 0.3  # 0.02 s on an idle machine


def test_a_shell_that_completes_a_line_does_not_wait_for_torch(root):
    code = """
import sys, flopeq.cli as cli
assert "torch" not in sys.modules
print(cli._complete_model("flop_deit3_s"))
"""
    assert python(root, code, _FLOPEQ_COMPLETE="complete_bash") == "['flop_deit3_small_patch16_224']\n"


def test_an_old_python_is_told_what_is_needed(monkeypatch):
    import importlib

    import flopeq

    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    with pytest.raises(ImportError, match="flopeq needs Python 3.11 or newer, and this is"):
        importlib.reload(flopeq)
