"""dvc.yaml and the fingerprint of a training: what makes a network is what they depend on."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import grimp
import pytest

from pipeline.base.source_code import code_of
from pipeline.base.yaml_files import read_yaml
from pipeline.training.fingerprint import NOT_FINGERPRINTED, fingerprinted_files
from pipeline.training.outputs import WEIGHTS_FILES

ROOT = Path(__file__).resolve().parents[2]
NAMES_ONLY = {"flopeq/registry.py"}
STARTS_TRAININGS = ("pipeline/base/", "flopeq/registry.py", "flopeq/hardware.py")
"""Whose contents reach a training as parameters, or name a model or a machine."""

NO_DEPENDENCIES = (
    *(f"pipeline/base/{name}.py" for name in ("config", "errors", "files", "locks", "plotting", "progress",
                                              "scaling_params", "schema", "source_code", "tracking_uri",
                                              "yaml_files")),
    "pipeline/shards", "pipeline/track.py", "pipeline/cluster.py", "stages/__init__.py", "stages/inputs.py",
    "stages/workspace.py", "flopeq/registry.py",
)  # fmt: skip
"""Files of which no stage has to depend: their contents reach it as parameters, or they read and write files as they
are, log, connect, or name models."""

NO_DEPENDENCIES_OF = {
    "train": ("flopeq/hardware.py", "stages/train.py"),  # what was compiled is recorded; it starts the training
    # of stages.evaluate_weights
    **dict.fromkeys(("evaluate", "symmetrize"), ("flopeq/hub", "pipeline/training/fingerprint.py")),
    "paper_sizes": ("pipeline/evaluation/networks.py", "flopeq/symmetrization"),  # of the runs' throughput
    "report": ("flopeq/backends", "flopeq/hardware.py", "flopeq/irreps.py"),  # of networks, which it does not build
}

MODEL_FILES = [path.stem for path in (ROOT / "flopeq/models").glob("*.py") if path.stem != "__init__"]

STAGE_MODULES = {"recipe": "resolve", "tuned": "resolve"}


@cache
def import_graph() -> grimp.ImportGraph:
    """Who imports whom when it runs. `import flopeq` is left out: it imports the whole library, to register models."""
    # Without the cache, which may have imports for types of a run of lint-imports.
    graph = grimp.build_graph("flopeq", "pipeline", "stages", exclude_type_checking_imports=True, cache_dir=None)
    for imported in graph.find_modules_directly_imported_by("flopeq"):
        graph.remove_import(importer="flopeq", imported=imported)
    return graph


def imported_by(*modules: str) -> set[str]:
    """Files that these modules import, directly or not, themselves among them."""
    graph = import_graph()
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


@pytest.mark.parametrize("stage", ["train", "sweep_recipe", "sweep_hybrid", "scaling"])
def test_training_stages_depend_on_all_model_code(stage):
    made_by = imported_by(*(f"flopeq.models.{family}" for family in MODEL_FILES)) - NAMES_ONLY
    assert len(made_by) > 10
    assert not [file for file in made_by if not is_below(file, dependencies(stage))]
    assert made_by <= {*fingerprinted_files()} | {"flopeq/backends/malloc.py"}


@pytest.mark.parametrize("stage", read_yaml(ROOT / "dvc.yaml")["stages"])
def test_a_stage_depends_on_all_code_that_it_runs(stage):
    files = imported_by(f"stages.{STAGE_MODULES.get(stage, stage)}")
    if "flopeq/models/build.py" in files and stage != "report":
        files |= imported_by(*(f"flopeq.models.{family}" for family in MODEL_FILES))
    excused = (*NO_DEPENDENCIES, *NO_DEPENDENCIES_OF.get(stage, ()))
    assert len(files) > 5
    assert (
        sorted(
            file
            for file in files
            if not file.endswith("__init__.py") and not is_below(file, (*dependencies(stage), *excused))
        )
        == []
    )


def test_every_file_of_a_run_that_later_stages_read_is_an_output():
    stages = read_yaml(ROOT / "dvc.yaml")["stages"]
    written = {*stages["train"]["do"]["outs"], *stages["evaluate"]["do"]["outs"]}
    read = {path for path in dependencies("evaluate") if path.startswith("outputs/")}
    assert {f"outputs/${{key}}/{file}" for file in WEIGHTS_FILES.values()} <= read <= written


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
