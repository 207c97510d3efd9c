"""Temporary workspaces of `dvc exp run --temp` and `--queue`: they have the code and DVC's outputs, but no shards.

Shards are no outputs of DVC, because of their size. A temporary workspace therefore links those of its repository, if
they are of the same images and parameters, instead of packing them again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from pipeline.base.yaml_files import read_yaml, value_at

_WORKSPACES = (".dvc", "tmp", "exps")
"""Where DVC has its temporary workspaces, in the repository's folder."""

_SOURCE_SUMMARY = Path("data/source.json")
"""The out of the stage `prepare`."""

_COPIED = ("manifest.json", ".verified.json")
"""Small files, of which a workspace has its own. The others are links."""


def find_repository(workspace: Path) -> Path | None:
    """Returns the repository's folder if the folder is a temporary workspace of it, otherwise None."""
    parts = workspace.absolute().parts
    for start in range(len(parts) - len(_WORKSPACES) - 1, 0, -1):
        if parts[start : start + len(_WORKSPACES)] == _WORKSPACES:
            return Path(*parts[:start])
    return None


def link_shards(shards: Path) -> bool:
    """Links the repository's shards into a temporary workspace. Returns whether it did.

    It does not if this is no temporary workspace, if it has shards of its own, or if dvc.lock of the repository says
    that its shards are of other images or parameters, or are not those on disk.

    Args:
        shards: folder of the shards, relative to the workspace.
    """
    repository = find_repository(Path.cwd())
    if repository is None or shards.exists() or not _is_current(repository, shards):
        return False
    shards.mkdir(parents=True)
    for path in (repository / shards).iterdir():
        if path.name in _COPIED:
            shutil.copy(path, shards / path.name)
        elif path.is_file():
            (shards / path.name).symlink_to(path.resolve())
    logging.info("%s: links to the shards in %s", shards, repository / shards)
    return True


def _is_current(repository: Path, shards: Path) -> bool:
    """Whether the repository's shards are what the stage `shard` would write now."""
    lock, manifest = repository / "dvc.lock", repository / shards / "manifest.json"
    if not lock.is_file() or not manifest.is_file():
        return False
    entry = read_yaml(lock)["stages"].get("shard", {})
    hashes = {file["path"]: file.get("md5") for file in [*entry.get("deps", ()), *entry.get("outs", ())]}
    params, now = entry.get("params", {}).get("params.yaml", {}), read_yaml(Path("params.yaml"))
    # Code is not compared: the same images always give the same bytes.
    return (
        hashes.get((shards / "manifest.json").as_posix()) == _md5(manifest)
        and hashes.get(_SOURCE_SUMMARY.as_posix()) == _md5(_SOURCE_SUMMARY)
        and all(_to_json(value) == _to_json(value_at(now, name)) for name, value in params.items())
    )


def _to_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _md5(path: Path) -> str | None:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() if path.is_file() else None
