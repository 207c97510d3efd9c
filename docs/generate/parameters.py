"""The reference of params.yaml, from its typed model: every section, every field, its type, value and meaning."""

from __future__ import annotations

import types
import typing
from typing import Any

import annotated_types
from links import ROOT
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.base.config import Experiment
from pipeline.base.yaml_files import dump_yaml, read_yaml

_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "anything"}
_BOUNDS = {annotated_types.Gt: ("gt", ">"), annotated_types.Ge: ("ge", "≥"),
           annotated_types.Lt: ("lt", "<"), annotated_types.Le: ("le", "≤")}  # fmt: skip

HEAD = """# params.yaml

[params.yaml](../../params.yaml) is the experiment; [presets](../data.md) are files of the same form. This page is made
from the typed model of it, [schema.py](../../pipeline/base/schema.py), which refuses every other field, and every
value of another type, before anything starts. The values are those of params.yaml as committed; under `models` and
`recipes`, those of the first entry.
"""


def page() -> str:
    """The whole page, in Markdown."""
    committed = read_yaml(ROOT / "params.yaml")
    return HEAD + "".join(_section("", Experiment, committed))


def _section(path: str, model: type[BaseModel], values: Any) -> typing.Iterator[str]:
    """Heading and table of one section, then the sections in it."""
    values = values if isinstance(values, dict) else {}
    inner = []
    rows = []
    for name, field in model.model_fields.items():
        where = f"{path}.{name}" if path else name
        section, is_map = _section_in(field.annotation)
        value = values.get(name)
        if section is not None:
            if is_map:
                value = next(iter(value.values())) if value else None
            inner.append((f"{where}.<name>" if is_map else where, section, value))
            if not field.description:
                continue
        shown = _value(value) if section is None and name in values else ""
        rows.append(f"| `{name}` | {_type(field.annotation, field.metadata)} | {shown} | {_meaning(field)} |\n")
    if rows:
        yield f"\n## {f'`{path}`' if path else 'The experiment'}\n\n"
        if model.__doc__ and model.__module__.startswith("pipeline"):
            yield f"{model.__doc__.strip()}\n\n"
        yield "| field | type | value | meaning |\n| --- | --- | --- | --- |\n"
        yield from rows
    for where, section, value in inner:
        yield from _section(where, section, value)


def _section_in(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section that a field holds, and whether it holds a map of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for argument in typing.get_args(annotation):
        section, is_map = _section_in(argument)
        if section is not None:
            return section, is_map or typing.get_origin(annotation) is dict
    return None, False


def _meaning(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split()).replace("|", "\\|")
    return text if field.is_required() or field.default in (None, {}) else f"{text} Default: {_value(field.default)}."


def _type(annotation: Any, constraints: list[Any]) -> str:
    """A type in words: `number > 0`, `one of a, b`, `[integer, integer]`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        inner = [item for extra in annotation.__metadata__ for item in getattr(extra, "metadata", [extra])]
        return _type(arguments[0], inner)
    if origin is typing.Literal:
        return " or ".join(_value(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(argument, []) for argument in arguments)
    if origin is tuple:
        if arguments[-1:] == (...,):
            return f"list of: {_type(arguments[0], [])}"
        return f"[{', '.join(_type(argument, []) for argument in arguments)}]"
    if origin is list:
        return f"list of: {_type(arguments[0], [])}"
    if origin is dict:
        return f"map to: {_type(arguments[1], [])}"
    bounds = [
        f"{sign} {getattr(item, attribute):g}"
        for item in constraints
        for kind, (attribute, sign) in _BOUNDS.items()
        if isinstance(item, kind)
    ]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    name = _NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)).lower())
    return " ".join([name, ", ".join(bounds)]).strip()


def _value(value: Any) -> str:
    text = dump_yaml(value, flow=True).strip().removesuffix("...").strip()
    return f"`{text}`"
