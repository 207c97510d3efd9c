"""For mkdocstrings: our docstrings are prose; `Shape:`, `Cost:`, `Raises:` and the like begin lines of their own."""

from __future__ import annotations

import re
from typing import Any

import griffe

_LABEL = re.compile(r"^(Shape|Cost|Args|Returns|Raises): *", re.MULTILINE)
_CODE = re.compile(r"(`[^`]*`)")


class Prose(griffe.Extension):
    """Lays out every docstring as Markdown, in which a star or an angle bracket is just that."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.is_alias or obj.docstring is None:
            return
        parts = _CODE.split(obj.docstring.value)
        plain = "".join(part if part.startswith("`") else _escaped(part) for part in parts)
        obj.docstring.value = _LABEL.sub(lambda label: f"\n**{label[1]}:** ", plain)


def _escaped(text: str) -> str:
    return re.sub(r"([*<|])", r"\\\1", text)
