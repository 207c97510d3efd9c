"""Templates of this folder, filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2


def render(template: str, **content: Any) -> str:
    """A template of this folder, filled in; what goes into HTML is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**content)
