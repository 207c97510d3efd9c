"""Writes a preset over params.yaml: `python -m stages.preset imagenette <folder>`."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.base import config, errors
from pipeline.base.errors import ConfigError
from pipeline.base.yaml_files import parse_yaml, read_yaml
from stages import run_stage, seeds

PARAMS = Path("params.yaml")

BACKUP = Path("params.yaml.orig")


def run(name: str, source: str | None = None) -> None:
    """Writes presets/<name>.yaml over params.yaml, with `source` as its data.source if given.

    Without git, or in a folder that git refuses, the params.yaml before is kept as params.yaml.orig.
    Raises: ConfigError for an unknown preset, a mistake in it, or when params.yaml has changes that would be lost.
    """
    presets = {path.stem: path for path in sorted(Path("presets").glob("*.yaml"))}
    if name not in presets:
        raise ConfigError(f"no preset named {name!r}{errors.did_you_mean(name, presets)}")
    content = presets[name].read_text(encoding="utf-8")
    if source is not None:
        where = source if "://" in source else str(Path(source).expanduser())
        line = f"  source: {json.dumps(where, ensure_ascii=False)}"
        content = re.sub(r"^  source:.*$", lambda _: line, content, flags=re.MULTILINE)
    wanted = parse_yaml(content, str(presets[name]))
    before = read_yaml(PARAMS) if PARAMS.is_file() else None
    if before is not None and _without_added_seeds(before, wanted) == wanted:
        return
    restore = f"`git checkout {PARAMS}` restores the committed version"
    if before is not None and not _is_preset(before, presets.values()):
        changed = _has_uncommitted_changes()
        if changed:
            raise ConfigError(f"{PARAMS} has changes that preset {name!r} would overwrite: commit or move them first")
        if changed is None:
            _back_up()
            restore = f"git cannot tell whether it had changes, so {BACKUP} keeps what it was"
    PARAMS.write_text(content, encoding="utf-8")
    config.load_experiment(PARAMS)
    logging.info("%s is now %s; %s", PARAMS, presets[name], restore)


def _is_preset(params: Any, presets: Iterable[Path]) -> bool:
    """Whether the content of params.yaml is, apart from data.source and added seeds, that of a preset."""

    def comparable(content: Any) -> Any:
        return {**content, "data": {**content["data"], "source": None}}

    contents = map(read_yaml, presets)
    return any(comparable(_without_added_seeds(params, preset)) == comparable(preset) for preset in contents)


def _without_added_seeds(params: Any, preset: Any) -> Any:
    return seeds.without_seed_runs(params, keep=preset)


def _back_up() -> None:
    if BACKUP.is_file() and BACKUP.read_bytes() != PARAMS.read_bytes():
        raise ConfigError(f"{BACKUP} would be overwritten by {PARAMS}, which git does not keep: move one of them first")
    shutil.copy(PARAMS, BACKUP)


def _has_uncommitted_changes() -> bool | None:
    """Whether params.yaml differs from git's version. None if git has none, is missing, or refuses the folder."""
    try:
        if _run_git("ls-files", "--error-unmatch", "--", str(PARAMS)):
            return None
        return {0: False, 1: True}.get(_run_git("diff", "--quiet", "HEAD", "--", str(PARAMS)))
    except FileNotFoundError:
        return None


def _run_git(*words: str) -> int:
    return subprocess.run(["git", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    run_stage(run)
