"""Checkpoints of other configurations of a run: what differs from them, and starting from one of them knowingly."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from pyarrow.fs import copy_files
from torch import nn

from pipeline.base.errors import ConfigError
from pipeline.base.files import open_filesystem
from pipeline.training.checkpoints import CheckpointManager
from pipeline.training.fingerprint import describe_differences
from pipeline.training.run_directory import RunDirectory

logger = logging.getLogger(__name__)

_MUST_AGREE = ("data", "recipe.global_batch_size", "recipe.optimizer")
"""Inputs that give the numbers in a checkpoint their meaning: its step, and the state of its optimizer."""

_MAX_PHRASES = 8


def log_other_configurations(run_dir: RunDirectory, inputs: Mapping[str, Any], run_name: str) -> None:
    """Warns of checkpoints of other configurations: where they are, what differs, how to use or delete them."""
    others = [other for other in _others(run_dir) if other.list_checkpoints()]
    if not others:
        return
    newest = others[0]
    logger.warning(
        "%s starts anew, and keeps %s of another configuration in %s: %s. `python -m stages.train %s --adopt %s` "
        "continues from it instead; `python -m stages.prune` lists and deletes what is not used%s",
        run_name,
        newest.list_checkpoints()[-1],
        newest.storage,
        "; ".join(_shorten(newest.differences(inputs))),
        run_name,
        newest.fingerprint,
        f", also of {len(others) - 1} older configurations" if len(others) > 1 else "",
    )


def adopt_checkpoint(
    run_dir: RunDirectory, fingerprint: str, inputs: Mapping[str, Any], model: nn.Module, weights: Sequence[str]
) -> None:
    """Copies the latest checkpoint of another configuration, so that the training continues from it.

    `adopted.json` keeps the other configuration, the step and what differs.

    Args:
        model: the network to train, on any device.
        weights: names of the weights that the training keeps.
    Raises: ConfigError if there is no such checkpoint, if the run has one of its own, or if it does not fit.
    """
    source = next((other for other in _others(run_dir) if other.fingerprint == fingerprint), None)
    run_name = run_dir.lock_file.parent.parent.name
    if source is None:
        known = ", ".join(other.fingerprint for other in _others(run_dir)) or "none"
        raise ConfigError(f"--adopt {fingerprint}: {run_name} has no such configuration; known: {known}")
    if own := run_dir.list_checkpoints():
        raise ConfigError(
            f"--adopt {fingerprint}: {run_name} has {own[-1]} of its own; leave --adopt out to continue from there"
        )
    checkpoints = CheckpointManager(source.checkpoints_location, keep=1)
    name = checkpoints.latest()
    if name is None:
        raise ConfigError(f"--adopt {fingerprint}: it has no complete checkpoint")
    before = source.load("inputs")
    for key in _MUST_AGREE if before else ():
        if before.get(key) != inputs[key]:
            raise ConfigError(
                f"--adopt {fingerprint}: {'; '.join(describe_differences(before, inputs))}: {key} differs"
            )
    state, best = checkpoints.load(name)
    if message := _find_mismatch(state["model"], model) or _find_missing(best, weights):
        raise ConfigError(f"--adopt {fingerprint}: {message}")
    (files, path), (own_files, own_path) = (
        open_filesystem(f"{directory.checkpoints_location}/{name}") for directory in (source, run_dir)
    )
    own_files.create_dir(own_path, recursive=True)
    copy_files(path, own_path, source_filesystem=files, destination_filesystem=own_files)
    step = int(PurePosixPath(path).name.removeprefix("step-"))
    found = source.differences(inputs)
    run_dir.save("adopted", {"fingerprint": fingerprint, "step": step, "differences": found})
    logger.warning("%s continues from %s of configuration %s: %s", run_name, name, fingerprint, "; ".join(found))


def _others(run_dir: RunDirectory) -> list[RunDirectory]:
    return [other for other in run_dir.list_configurations() if other.fingerprint != run_dir.fingerprint]


def _shorten(phrases: list[str]) -> list[str]:
    return phrases if len(phrases) <= _MAX_PHRASES else [*phrases[:_MAX_PHRASES], f"{len(phrases) - _MAX_PHRASES} more"]


def _find_mismatch(state: Mapping[str, Any], model: nn.Module) -> str | None:
    """Returns the first difference between the weights of a checkpoint and those of the model, or None."""
    expected = model.state_dict()
    for name in dict.fromkeys([*expected, *state]):
        if name not in state or name not in expected or state[name].shape != expected[name].shape:
            shapes = [tuple(each[name].shape) if name in each else "absent" for each in (state, expected)]
            return f"its model is another one: {name} is {shapes[0]} there and {shapes[1]} here"
    return None


def _find_missing(best: Mapping[str, Any], weights: Sequence[str]) -> str | None:
    if set(best) != set(weights):
        return f"it keeps {', '.join(best)} weights, and this recipe {', '.join(weights)}"
    return None
