"""JSON files as notes between stages: what is there, or a default; and written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json(path: Path, default: Any) -> Any:
    """What a file holds, or the default where there is none."""
    return json.loads(path.read_text()) if path.is_file() else default


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file under another name and then gives it its own; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)
