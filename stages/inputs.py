"""What a stage depends on must not change while it runs.

DVC writes into dvc.lock what parameters and code are when a stage has ended. If they were edited meanwhile, dvc.lock
would say that the outputs were made from the edited ones. A stage that DVC runs therefore fails then, and DVC records
nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.base.errors import ConfigError
from pipeline.base.source_code import code_of
from pipeline.base.yaml_files import parse_yaml, value_at

_PARAMS, _STAGES = "params.yaml", "dvc.yaml"

_CODE = ("flopeq", "pipeline", "stages")


@contextmanager
def unchanged_inputs() -> Iterator[None]:
    """Context manager of a stage. Outside DVC it does nothing.

    Raises: ConfigError at the end, if parameters or code of the stage have changed. Comments and docstrings may change.
    """
    stage = os.environ.get("DVC_STAGE")
    if stage is None:
        yield
        return
    before = _read_files()
    yield
    now = _read_files()
    if before == now:
        return
    if changed := [*_changed_params(stage, before, now), *_changed_code(stage, before, now)]:
        raise ConfigError(
            f"{', '.join(changed)} changed while {stage} ran, so DVC does not record its outputs: give the same "
            "command again; what was trained before the change is kept"
        )


def _read_files() -> dict[str, str]:
    """Returns the content of all files of code, of params.yaml and of dvc.yaml."""
    paths = [Path(_PARAMS), Path(_STAGES), *(path for folder in _CODE for path in sorted(Path(folder).rglob("*.py")))]
    return {path.as_posix(): path.read_text(errors="replace") for path in paths if path.is_file()}


def _changed_params(stage: str, before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Returns the names of the parameters of the stage whose values differ."""
    entry, key = _find_stage(stage, before)
    contents = [parse_yaml(files[_PARAMS], _PARAMS) for files in (before, now)]
    # A name with the value of another parameter in it stands for its whole section.
    names = [name.replace("${key}", key).partition(".${")[0] for name in entry.get("params", ())]
    return [name for name in names if value_at(contents[0], name) != value_at(contents[1], name)]


def _changed_code(stage: str, before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Returns the files of code that the stage depends on and that differ."""
    dependencies = _find_stage(stage, before)[0].get("deps", ())
    return [
        path
        for path in dict.fromkeys([*before, *now])
        if any(path == dependency or path.startswith(f"{dependency}/") for dependency in dependencies)
        and _differs(before.get(path), now.get(path))
    ]


def _find_stage(stage: str, files: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Returns the stage in dvc.yaml, and its key if it is one of several."""
    name, _, key = stage.rpartition(":")[2].partition("@")
    entry = parse_yaml(files[_STAGES], _STAGES)["stages"][name]
    return entry.get("do", entry), key


def _differs(before: str | None, now: str | None) -> bool:
    if before == now:
        return False
    if before is None or now is None:
        return True
    try:
        return code_of(before) != code_of(now)
    except SyntaxError:  # half-edited
        return True
