"""Checkpoints that no run uses any more."""

from __future__ import annotations

from pathlib import Path

from pipeline.base import locks
from pipeline.base.config import Experiment
from pipeline.base.files import read_json
from pipeline.shards import manifests
from pipeline.training.fingerprint import hash_inputs, training_inputs
from pipeline.training.run_directory import RunDirectory


def list_unused(experiment: Experiment, run_name: str) -> list[tuple[RunDirectory, list[str]]]:
    """Returns the configurations of a run that are not used, each with what differs from the current one.

    The current configuration is used, and so is that of the weights in outputs/<run>/.
    Raises: ConfigError if a sweep has not found the recipe yet; ShardError without shards.
    """
    shards = manifests.Shards(experiment.data.shards)
    inputs = training_inputs(experiment.resolved(run_name), shards)
    current = RunDirectory.for_run(experiment, run_name, hash_inputs(inputs))
    used = {current.fingerprint, read_json(Path("outputs", run_name, "run.json"), {}).get("fingerprint")}
    return [
        (other, other.differences(inputs)) for other in current.list_configurations() if other.fingerprint not in used
    ]


def delete_unused(run_dir: RunDirectory) -> None:
    """Deletes a configuration. Raises: BusyError while a process trains the run."""
    with locks.hold_lock(run_dir.lock_file, str(run_dir.lock_file.parent)):
        run_dir.delete()
