"""A stage whose parameters or code are edited while it runs fails, so that DVC does not record its outputs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.base.errors import ConfigError
from stages.inputs import unchanged_inputs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what stages depend on, as the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, name)
    for name in ("flopeq/layers", "flopeq/models", "pipeline/training", "pipeline/sweeps"):
        shutil.copytree(ROOT / name, name)
    return tmp_path


def edit(path: str, before: str, after: str) -> None:
    text = Path(path).read_text()
    assert before in text
    Path(path).write_text(text.replace(before, after, 1))


LR = ("params.yaml", "lr: 2.0e-3", "lr: 3.0e-3")
AMP = ("params.yaml", "amp: null", "amp: bf16")
DIGITS_ARGS = ("params.yaml", "embed_dim: 64", "embed_dim: 32")
CODE = ("flopeq/layers/linear.py", "from torch import", "import math\nfrom torch import")
COMMENT = ("flopeq/layers/linear.py", "from torch import", "# a remark\nfrom torch import")


@pytest.mark.parametrize(
    ("stage", "change", "named"),
    [
        ("train@vit", AMP, "train changed while train@vit ran"),
        ("train@vit", DIGITS_ARGS, "models.vit changed"),
        ("train@resmlp", ("params.yaml", "embed_dim: 64, depth", "embed_dim: 32, depth"), None),  # of another run
        ("train@vit", LR, None),  # it depends on the file of the recipe
        ("recipe@digits", LR, "recipes.digits changed"),
        ("tuned@vit-tuned", LR, "recipes changed"),
        ("sweep_recipe", LR, "recipes changed"),
        ("sweep_recipe", CODE, "flopeq/layers/linear.py changed"),
        ("sweep_recipe", COMMENT, None),
        ("complexity", AMP, None),
        (None, AMP, None),  # not under DVC
    ],
)
def test_what_a_stage_depends_on_may_not_change_while_it_runs(stage, change, named, folder, monkeypatch):
    monkeypatch.delenv("DVC_STAGE", raising=False)
    if stage is not None:
        monkeypatch.setenv("DVC_STAGE", stage)
    if named is None:
        with unchanged_inputs():
            edit(*change)
        return
    with pytest.raises(ConfigError, match=named), unchanged_inputs():
        edit(*change)


def test_new_files_and_half_edited_ones_count(folder, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "train@vit")
    message = r"loop\.py, .*models/new\.py changed"
    with pytest.raises(ConfigError, match=message), unchanged_inputs():
        Path("flopeq/models/new.py").write_text("")
        Path("pipeline/training/loop.py").write_text("def half(")


def test_the_error_of_the_stage_itself_comes_first(folder, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "train@vit")
    with pytest.raises(KeyError), unchanged_inputs():
        edit(*AMP)
        raise KeyError
