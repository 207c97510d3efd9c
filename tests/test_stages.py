"""dvc.yaml: what makes a network is what its stages depend on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pipeline.train import CODE

ROOT = Path(__file__).resolve().parent.parent
IMPORT = re.compile(r"^from flopeq\.(\w+) import", re.MULTILINE)
NAMES_ONLY = {"flopeq/registry.py"}


def imported_by(files: set[str]) -> set[str]:
    """Files of the library that these import at their head, themselves among them."""
    found = {f"flopeq/{name}.py" for file in files for name in IMPORT.findall((ROOT / file).read_text())}
    return files if found <= files else imported_by(files | found)


@pytest.mark.parametrize("stage", ["train", "sweep_recipe", "sweep_hybrid"])
def test_what_trains_depends_on_every_file_that_makes_a_network(stage):
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    deps = set(stages[stage].get("do", stages[stage])["deps"])
    made_by = imported_by({f"flopeq/{family}.py" for family in ("vit", "resmlp", "convnext")})
    assert len(made_by) > 5
    assert made_by - NAMES_ONLY <= deps & set(CODE)


def test_training_runs_again_where_it_would_not_go_on():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert set(CODE) <= set(stages["train"]["do"]["deps"])
