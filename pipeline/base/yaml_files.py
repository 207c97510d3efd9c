"""Reads and writes params.yaml, presets and every other YAML file of an experiment, as DVC does.

DVC reads and rewrites params.yaml as YAML 1.2 with ruamel.yaml. PyYAML reads YAML 1.1, where `off` is false and `1e-4`
is text, so it must not read these files.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from pipeline.base.errors import ConfigError

# Text that YAML 1.1 reads as a boolean or as a number to the base 60. It is written in quotes.
_NOT_TEXT_IN_YAML_1_1 = re.compile(r"(?i:y|n|yes|no|on|off)|[-+]?\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?")


def read_yaml(path: Path) -> Any:
    """Returns the content of a file, or None if it is empty. Raises: ConfigError, as `parse_yaml` does."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None


def parse_yaml(text: str, name: str) -> Any:
    """Returns the value of a YAML 1.2 text, or None if it is empty.

    Args:
        name: of the file, for the error.
    Raises: ConfigError with the position if the text is not valid YAML, or repeats a key.
    """
    try:
        return YAML(typ="safe").load(text)
    except YAMLError as error:
        raise ConfigError(f"{name} is not valid YAML: {error}") from None


def dump_yaml(content: Any, *, flow: bool = False) -> str:
    """Returns plain values as YAML that versions 1.1 and 1.2 read alike.

    Args:
        flow: whether to write one line, `{a: 1, b: [2, 3]}`.
    """
    yaml = YAML()
    yaml.Representer = _PortableRepresenter
    yaml.default_flow_style = flow
    yaml.width = 10**9
    text = io.StringIO()
    yaml.dump(content, text)
    return text.getvalue()


class _PortableRepresenter(RoundTripRepresenter):
    """Quotes text, and adds a point to numbers, where YAML 1.1 would read another type. Writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> ScalarNode:
        style = '"' if _NOT_TEXT_IN_YAML_1_1.fullmatch(data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    def represent_float(self, data: float) -> ScalarNode:
        node = super().represent_float(data)
        if "e" in node.value and "." not in node.value:
            node.value = node.value.replace("e", ".0e")
        return node


_PortableRepresenter.add_representer(str, _PortableRepresenter.represent_str)
_PortableRepresenter.add_representer(float, _PortableRepresenter.represent_float)


def value_at(content: Any, name: str) -> Any:
    """Returns the value under a name such as `train.workers`, or None."""
    for part in name.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content
