"""Importing the library is fast and does not import the pipeline or its dependencies."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Not listed: yaml, which timm requires, and pydantic, which typer requires.
PIPELINE_ONLY = (
    "ray", "mlflow", "dvc", "webdataset", "simplejpeg", "xxhash", "pyarrow", "psutil", "scipy", "pandas",
    "sklearn", "matplotlib", "jinja2", "s3fs", "onnx", "onnxscript", "onnxruntime", "pipeline", "stages",
)  # fmt: skip


def python(root, code, **env) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_library_is_fast_and_needs_no_pipeline_package(root):
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
from flopeq import cli, flops, testing
from flopeq.hub import convert, export, model_card
from flopeq.measure import comparison, profiling, throughput
try:
    cli.main(["complexity", "flop_deit3_small_patch16_224", "img_size=32", "depth=1"])
except SystemExit as stop:
    assert stop.code == 0
"""
    assert "flop_deit3_small_patch16_224" in python(root, code)


def test_shell_completion_does_not_import_torch(root):
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


def test_an_old_python_is_refused_with_the_needed_version(monkeypatch):
    import importlib

    import flopeq

    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    with pytest.raises(ImportError, match="flopeq needs Python 3.11 or newer, and this is"):
        importlib.reload(flopeq)
