"""Studies of synthetic runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.scaling.fits import Analysis, analyze
from pipeline.scaling.runs import load_study
from tests.scaling.synthetic import Plan, write_study


@pytest.fixture
def analyzed(tmp_path: Path) -> Callable[..., Analysis]:
    """Writes a synthetic study and analyzes it."""

    def analyze_plan(seed: int = 0, **plan: Any) -> Analysis:
        write_study(tmp_path, Plan(**plan), seed)
        return analyze(load_study(tmp_path))

    return analyze_plan
