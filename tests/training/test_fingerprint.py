"""dvc.yaml and the fingerprint of a training: what makes a network is what they depend on."""

from __future__ import annotations

import re
from pathlib import Path

import grimp
import pytest

from pipeline.base.yaml_files import read_yaml
from pipeline.training.fingerprint import NOT_FINGERPRINTED, code_of, fingerprinted_files

ROOT = Path(__file__).resolve().parents[2]
NAMES_ONLY = {"flopeq/registry.py"}
STARTS_TRAININGS = ("pipeline/base/", "flopeq/registry.py", "flopeq/hardware.py")
"""Whose contents reach a training as parameters, or name a model or a machine."""


def imported_by(*modules: str) -> set[str]:
    """Files that these modules import, directly or not, themselves among them."""
    graph = grimp.build_graph("flopeq", "pipeline", "stages")
    found = set(modules).union(*(graph.find_upstream_modules(module) for module in modules))
    paths = (ROOT / name.replace(".", "/") for name in found)
    return {
        (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).relative_to(ROOT).as_posix()
        for path in paths
    }


def dependencies(stage: str) -> tuple[str, ...]:
    stages = read_yaml(ROOT / "dvc.yaml")["stages"]
    return tuple(stages[stage].get("do", stages[stage])["deps"])


def is_below(file: str, paths: tuple[str, ...]) -> bool:
    return any(file == path or file.startswith(path.rstrip("/") + "/") for path in paths)


@pytest.mark.parametrize("stage", ["train", "sweep_recipe", "sweep_hybrid"])
def test_training_stages_depend_on_all_model_code(stage):
    made_by = imported_by(*(f"flopeq.models.{family}" for family in ("vit", "resmlp", "convnext"))) - NAMES_ONLY
    assert len(made_by) > 10
    assert not [file for file in made_by if not is_below(file, dependencies(stage))]
    assert made_by <= {*fingerprinted_files()} | {"flopeq/backends/malloc.py"}


def test_train_depends_on_all_that_a_worker_imports():
    files = {file for file in imported_by("pipeline.training.worker") if not file.endswith("__init__.py")}
    assert len(files) > 15
    assert not [file for file in files if not is_below(file, (*dependencies("train"), *STARTS_TRAININGS))]


def test_fingerprinted_code_is_that_of_models_loading_and_the_loop():
    files = set(fingerprinted_files())
    assert {"flopeq/models/vit.py", "flopeq/layers/attention.py", "pipeline/loading/augment.py",
            "pipeline/training/loop.py", "pipeline/training/worker.py"} <= files  # fmt: skip
    assert not [file for file in files if is_below(file, NOT_FINGERPRINTED)]
    assert not [path for path in NOT_FINGERPRINTED if not (ROOT / path).exists()]


CODE = '''"""What it is."""

def area(width):  # in metres
    """Its area."""
    return 2 * width
'''


def test_comments_docstrings_and_layout_do_not_count():
    edited = CODE.replace("metres", "feet").replace("Its area", "The area").replace("\n\n", "\n")
    assert code_of(CODE) == code_of(edited)
    assert code_of(CODE) == code_of(re.sub(r'"""[^"]*"""\n', "", CODE))


def test_code_counts():
    assert code_of(CODE) != code_of(CODE.replace("2", "3"))
    assert code_of(CODE) != code_of(CODE.replace("width", "height"))
