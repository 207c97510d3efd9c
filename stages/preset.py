"""Writes a preset over params.yaml: `python -m stages.preset imagenette <folder>`."""

from __future__ import annotations

import json
import logging
import re
import subprocess
from pathlib import Path

from pipeline.base import config, errors
from pipeline.base.errors import ConfigError
from stages import run_stage, seeds

PARAMS = Path("params.yaml")


def run(name: str, source: str | None = None) -> None:
    """Writes presets/<name>.yaml over params.yaml, with `source` as its data.source if given.

    Raises: ConfigError for an unknown preset, a mistake in it, or when params.yaml has changes that would be lost.
    """
    presets = {path.stem: path for path in sorted(Path("presets").glob("*.yaml"))}
    if name not in presets:
        raise ConfigError(f"no preset named {name!r}{errors.did_you_mean(name, presets)}")
    content = presets[name].read_text()
    if source is not None:
        where = source if "://" in source else str(Path(source).expanduser())
        content = re.sub(r"^  source:.*$", lambda _: f"  source: {json.dumps(where)}", content, flags=re.MULTILINE)
    if PARAMS.is_file() and seeds.remove_seed_runs(PARAMS.read_text()) == content:
        return
    if _has_uncommitted_changes():
        raise ConfigError(f"{PARAMS} has changes that preset {name!r} would overwrite: commit or move them first")
    PARAMS.write_text(content)
    config.load_experiment(PARAMS)
    logging.info("%s is now %s; `git checkout %s` restores the committed version", PARAMS, presets[name], PARAMS)


def _has_uncommitted_changes() -> bool:
    """Whether params.yaml differs from git's version and, apart from data.source and seeds, from every preset."""
    if not subprocess.run(["git", "diff", "--quiet", "HEAD", "--", str(PARAMS)]).returncode:
        return False
    without_source = [
        re.sub(r"^  source:.*$", "", seeds.remove_seed_runs(path.read_text()), flags=re.MULTILINE)
        for path in (PARAMS, *Path("presets").glob("*.yaml"))
    ]
    return without_source[0] not in without_source[1:]


if __name__ == "__main__":
    run_stage(run)
