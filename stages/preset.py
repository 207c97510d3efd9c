"""Writes a preset over params.yaml: `python -m stages.preset imagenette <folder>`."""

from __future__ import annotations

import json
import logging
import re
import subprocess
from pathlib import Path

from pipeline import config
from pipeline.config import ConfigError
from stages import main, seeds

PARAMS = Path("params.yaml")


def run(name: str, source: str | None = None) -> None:
    """Takes presets/<name>.yaml as the experiment, with `source` for its data.source where one is given.

    Raises: ConfigError for an unknown preset, a mistake in it, or when params.yaml has changes that would be lost.
    """
    presets = {path.stem: path for path in sorted(Path("presets").glob("*.yaml"))}
    if name not in presets:
        raise ConfigError(f"no preset named {name!r}{config.nearest(name, presets)}")
    content = presets[name].read_text()
    if source is not None:
        where = source if "://" in source else str(Path(source).expanduser())
        content = re.sub(r"^  source:.*$", lambda _: f"  source: {json.dumps(where)}", content, flags=re.MULTILINE)
    if PARAMS.is_file() and seeds.without(PARAMS.read_text()) == content:
        return
    if _has_own_changes():
        raise ConfigError(f"{PARAMS} has changes that preset {name!r} would overwrite: commit or move them first")
    PARAMS.write_text(content)
    config.load(PARAMS)
    logging.info("%s is now %s; `git checkout %s` brings back what is committed", PARAMS, presets[name], PARAMS)


def _has_own_changes() -> bool:
    """Whether params.yaml holds anything that neither git nor, but for data.source and seeds, a preset has."""
    if not subprocess.run(["git", "diff", "--quiet", "HEAD", "--", str(PARAMS)]).returncode:
        return False
    without_source = [
        re.sub(r"^  source:.*$", "", seeds.without(path.read_text()), flags=re.MULTILINE)
        for path in (PARAMS, *Path("presets").glob("*.yaml"))
    ]
    return without_source[0] not in without_source[1:]


if __name__ == "__main__":
    main(run)
