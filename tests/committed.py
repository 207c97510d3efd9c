"""The committed params.yaml, cut down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

PARAMS = Path(__file__).resolve().parent.parent / "params.yaml"


def only(*run_names: str) -> dict[str, Any]:
    """The experiment with these runs and no sweep."""
    params = yaml.safe_load(PARAMS.read_text())
    params["models"] = {name: run for name, run in params["models"].items() if name in run_names}
    params["sweeps"]["recipe"] |= {"runs": [], "own_space": {}}
    params["sweeps"] |= {"hybrid": {**params["sweeps"]["hybrid"], "runs": []}, "tuned": {}}
    return params
