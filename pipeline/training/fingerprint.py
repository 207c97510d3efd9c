"""The fingerprint of a training: a hash of everything that determines its weights.

The hashed code is the dependencies of the stage `train` in dvc.yaml, without `NOT_FINGERPRINTED`. New code is hashed
unless it is listed there: a missing entry costs a retraining, but never gives stale weights. Comments and docstrings
are not hashed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.base.source_code import code_of
from pipeline.base.yaml_files import read_yaml
from pipeline.shards import manifests

ROOT = Path(__file__).resolve().parents[2]
NOT_FINGERPRINTED = (
    "pipeline/shards", "pipeline/cluster.py", "flopeq/backends/malloc.py",
    *(f"pipeline/training/{name}.py" for name in
      ("adoption", "batch_size", "checkpoints", "device_settings", "epoch_tracker", "failures", "fingerprint",
       "outputs", "pruning", "report_log", "run_directory", "step_log", "trainer")),
)  # fmt: skip
"""Code that starts, stores or reports a training and does not affect its weights."""

# Settings that do not affect the weights; those of the data are covered by the shards' content hash.
FINGERPRINT_IGNORED = {
    "train": {"workers", "cpus_per_worker", "gpu", "loader_workers", "batch_per_worker", "checkpoint_steps",
              "keep_checkpoints"},
    "data": {"name", "source", "labels", "on_bad_image", "images_per_shard", "cache_gib", "further_val",
             "class_names", "source_hint", "flop_invariant", "has_up"},
}  # fmt: skip


def compute_fingerprint(configuration: Mapping[str, Any], shards: manifests.Shards) -> str:
    """Returns a hash of everything that determines the final weights: configuration, data, code, packages."""
    return hash_inputs(training_inputs(configuration, shards))


def hash_inputs(inputs: Mapping[str, Any]) -> str:
    """Returns the fingerprint of the inputs of a training."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def training_inputs(configuration: Mapping[str, Any], shards: manifests.Shards) -> dict[str, Any]:
    """Returns everything that determines the final weights, by name.

    The names are those of settings (`recipe.lr`), of packages (`torch`) with their version, of files of code with a
    hash, and `data` with a hash of the shards' content.
    """
    relevant = {
        section: {key: value for key, value in configuration[section].items() if key not in ignored}
        for section, ignored in FINGERPRINT_IGNORED.items()
    }
    return {
        **_flatten({**configuration, **relevant}),
        **{package: version(package) for package in ("ray", "simplejpeg", "timm", "torch")},
        "data": shards.fingerprint,
        **{path: _hash_code(ROOT / path) for path in fingerprinted_files()},
    }


def describe_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns a phrase for every input that differs, such as `recipe.lr 0.1 -> 0.2`, `loop.py changed`."""
    phrases = []
    for name in dict.fromkeys([*now, *before]):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        is_hash = name == "data" or name.endswith(".py")
        action = "is new" if name not in before else "is gone" if name not in now else "changed"
        phrases.append(f"{name} {action}" if is_hash else f"{name} {old} -> {new}")
    return phrases


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"recipe": {"lr": 0.1}} -> {"recipe.lr": 0.1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _hash_code(path: Path) -> str:
    return hashlib.sha256(code_of(path.read_text()).encode()).hexdigest()


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
