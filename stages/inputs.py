"""What a stage depends on must not change while it runs.

DVC writes into dvc.lock what parameters and code are when a stage has ended. If they were edited meanwhile, dvc.lock
would say that the outputs were made from the edited ones. A stage that DVC runs therefore fails then, and DVC records
nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.base.errors import ConfigError
from pipeline.base.source_code import code_of
from pipeline.base.yaml_files import read_yaml, value_at

PARAMS = Path("params.yaml")

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
    params, code = _read_params(stage), _read_code(stage)
    yield
    now, code_now = _read_params(stage), _read_code(stage)
    changed = [name for name in params if params[name] != now[name]]
    changed += [path for path in dict.fromkeys([*code, *code_now]) if _differs(code.get(path), code_now.get(path))]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)} changed while {stage} ran, so DVC does not record its outputs: give the same "
            "command again; what was trained before the change is kept"
        )


def _read_params(stage: str) -> dict[str, Any]:
    """Returns the values of the parameters of a stage, by name."""
    entry, key = _entry(stage)
    content = read_yaml(PARAMS)
    values = {}
    for template in entry.get("params", ()):
        # A name with the value of another parameter in it stands for its whole section.
        name = template.replace("${key}", key).partition(".${")[0]
        values[name] = value_at(content, name)
    return values


def _read_code(stage: str) -> dict[str, bytes]:
    """Returns the content of the files of code that a stage depends on."""
    files = set()
    for dependency in _entry(stage)[0].get("deps", ()):
        path = Path(dependency)
        if path.parts[0] in _CODE:
            files |= set(path.rglob("*.py")) if path.is_dir() else {path}
    return {path.as_posix(): path.read_bytes() for path in sorted(files) if path.is_file()}


def _entry(stage: str) -> tuple[dict[str, Any], str]:
    """Returns the stage in dvc.yaml, and its key if it is one of several."""
    name, _, key = stage.rpartition(":")[2].partition("@")
    entry = read_yaml(Path("dvc.yaml"))["stages"][name]
    return entry.get("do", entry), key


def _differs(before: bytes | None, now: bytes | None) -> bool:
    if before == now:
        return False
    if before is None or now is None:
        return True
    try:
        return code_of(before.decode()) != code_of(now.decode())
    except (SyntaxError, UnicodeDecodeError):  # half-edited, or no Python
        return True
