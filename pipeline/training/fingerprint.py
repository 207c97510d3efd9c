"""The fingerprint of a training: a hash of everything that determines its weights.

The hashed code is the dependencies of the stage `train` in dvc.yaml, without `NOT_FINGERPRINTED`. New code is hashed
unless it is listed there: a missing entry costs a retraining, but never gives stale weights. Comments and docstrings
are not hashed.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.base.yaml_files import read_yaml
from pipeline.shards import manifests

ROOT = Path(__file__).resolve().parents[2]
NOT_FINGERPRINTED = (
    "pipeline/shards", "pipeline/cluster.py", "flopeq/backends/malloc.py",
    *(f"pipeline/training/{name}.py" for name in
      ("trainer", "run_directory", "fingerprint", "report_log", "checkpoints", "device_settings")),
)  # fmt: skip
"""Code that starts, stores or reports a training and does not affect its weights."""

# Settings that do not affect the weights; those of the data are covered by the shards' content hash.
FINGERPRINT_IGNORED = {
    "train": {"workers", "cpus_per_worker", "gpu", "loader_workers", "batch_per_worker", "checkpoint_steps",
              "keep_checkpoints"},
    "data": {"name", "source", "labels", "on_bad_image", "images_per_shard", "cache_gib", "further_val",
             "class_names", "source_hint", "flop_invariant"},
}  # fmt: skip


def compute_fingerprint(configuration: Mapping[str, Any], shards: manifests.Shards) -> str:
    """Returns a hash of everything that determines the final weights: configuration, data, code, packages."""
    relevant = {
        section: {key: value for key, value in configuration[section].items() if key not in ignored}
        for section, ignored in FINGERPRINT_IGNORED.items()
    }
    versions = [version(package) for package in ("ray", "simplejpeg", "timm", "torch")]
    content = [{**configuration, **relevant}, versions, shards.fingerprint]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for path in fingerprinted_files():
        digest.update(path.encode())
        digest.update(code_of((ROOT / path).read_text()).encode())
    return digest.hexdigest()[:16]


@cache
def fingerprinted_files() -> tuple[str, ...]:
    """Returns the files whose code may change the weights, sorted, relative to the repository's root."""
    stages = read_yaml(ROOT / "dvc.yaml")["stages"]
    files = set()
    for dependency in stages["train"]["do"]["deps"]:
        if dependency.startswith(("flopeq/", "pipeline/")):
            path = ROOT / dependency
            files |= {file.relative_to(ROOT).as_posix() for file in (path.rglob("*.py") if path.is_dir() else [path])}
    return tuple(
        sorted(
            file for file in files if not any(file == left or file.startswith(f"{left}/") for left in NOT_FINGERPRINTED)
        )
    )


def code_of(source: str) -> str:
    """Returns the code of a Python file without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [
                statement for statement in body
                if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
                        and isinstance(statement.value.value, str))
            ]  # fmt: skip
            node.body = kept or [ast.Pass()]  # pyright: ignore[reportAttributeAccessIssue]
    return ast.unparse(tree)
