"""The library alone: what importing it costs, and that it needs nothing of the pipeline's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# YAML is there wherever timm is, and pydantic wherever typer is.
PIPELINE_ONLY = (
    "ray", "mlflow", "dvc", "webdataset", "simplejpeg", "xxhash", "pyarrow", "psutil", "scipy", "pandas",
    "sklearn", "matplotlib", "jinja2", "s3fs", "onnx", "onnxscript", "onnxruntime", "pipeline", "stages",
)  # fmt: skip


def python(root, code, **env) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_library_is_imported_fast_and_without_what_only_the_pipeline_needs(root):
    code = f"""
import sys, time
class Hide:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {PIPELINE_ONLY!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
import timm
start = time.perf_counter()
import flopeq
took = time.perf_counter() - start
assert took < 0.3, took  # 0.02 s on an idle machine
assert not {{"typer", "rich", "pydantic", "fvcore"}} & set(sys.modules)
from flopeq import benchmark, card, cli, comparison, convert, export, flops, profiling, testing
try:
    cli.main(["complexity", "flop_deit3_small_patch16_224", "img_size=32", "depth=1"])
except SystemExit as stop:
    assert stop.code == 0
"""
    assert "flop_deit3_small_patch16_224" in python(root, code)


def test_a_shell_that_completes_a_line_does_not_wait_for_torch(root):
    code = """
import sys
from flopeq.cli import app
try:
    app(prog_name="flopeq")
finally:
    assert "torch" not in sys.modules
"""
    asked = {"_FLOPEQ_COMPLETE": "complete_bash", "COMP_WORDS": "flopeq throughput flop_deit3_s", "COMP_CWORD": "2"}
    assert python(root, code, **asked) == "flop_deit3_small_patch16_224\n"


def test_an_old_python_is_told_what_is_needed(monkeypatch):
    import importlib

    import flopeq

    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    with pytest.raises(ImportError, match="flopeq needs Python 3.11 or newer, and this is"):
        importlib.reload(flopeq)
