"""outputs/<run>/ of a training that has ended: written from its run directory, and logged to MLflow.

A training first saves its outcome, so that it is never lost. Writing its outputs from there needs neither Ray nor
torch. The stage `train@<run>` does only that if the run was trained before, by itself or by `stages.train_all`.
"""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.base import locks
from pipeline.base.config import Experiment
from pipeline.base.files import checksum_file, open_filesystem, write_json
from pipeline.base.yaml_files import dump_yaml
from pipeline.shards import manifests
from pipeline.training.fingerprint import compute_fingerprint
from pipeline.training.run_directory import RunDirectory

logger = logging.getLogger(__name__)

HISTORY_COLUMNS = (
    "epoch",
    "lr",
    "train/loss",
    "val/loss",
    "val/top1_pct",
    "val/top5_pct",
    "perf/img_per_s",
    "perf/data_wait_pct",
)

EMA_HISTORY_COLUMNS = ("val/ema_loss", "val/ema_top1_pct", "val/ema_top5_pct")

WEIGHTS_FILES = {"plain": "weights.safetensors", "ema": "weights_ema.safetensors"}

_UPLOAD_WAITS_S = (2.0, 10.0, 0.0)  # after each attempt


def write_finished_outputs(experiment: Experiment, run_name: str) -> bool:
    """Writes outputs/<run>/ if the run was trained before, with everything as it is now. Returns whether it was.

    Raises: BusyError if another process trains this run.
    """
    shards = manifests.Shards(experiment.data.shards, cache_gib=experiment.data.cache_gib)
    fingerprint = compute_fingerprint(experiment.resolved(run_name), shards)
    run_dir = RunDirectory.for_run(experiment, run_name, fingerprint)
    if not run_dir.load("outcome"):
        return False
    with locks.hold_lock(run_dir.lock_file, f"the run {run_name} in {Path.cwd()}"):
        if not write_outputs(run_dir):
            return False
        logger.info("%s is trained already: its outputs are written again", run_name)
        track_outcome(run_dir)
    return True


def write_outputs(run_dir: RunDirectory) -> bool:
    """Writes weights.safetensors, weights_ema.safetensors, history.csv, config.yaml and run.json from the outcome.

    Without a moving average, weights_ema.safetensors has no tensors. Returns False if the weights in the run directory
    are missing or damaged.
    """
    outcome, folder = run_dir.load("outcome"), run_dir.local_dir.parent.parent
    for name, file in WEIGHTS_FILES.items():
        if not _copy_weights(run_dir, outcome["weights"].get(name), folder / file):
            logger.warning("%s: %s is missing or damaged", outcome["configuration"]["run"], outcome["weights"][name])
            return False
    if outcome["status"] == "diverged":
        logger.warning("%s diverged: %s", outcome["configuration"]["run"], outcome["message"])
    ema_columns = EMA_HISTORY_COLUMNS if "ema" in outcome["best_epoch"] else ()
    with (folder / "history.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, (*HISTORY_COLUMNS, *ema_columns), lineterminator="\n")
        table.writeheader()
        table.writerows(outcome["history"])
    (folder / "config.yaml").write_text(dump_yaml(outcome["configuration"]))
    adopted = run_dir.load("adopted")
    write_json(
        folder / "run.json",
        {
            "run": outcome["configuration"]["run"],
            "mlflow_run_id": run_dir.load("run")["mlflow_run_id"],
            "fingerprint": run_dir.fingerprint,
            "status": outcome["status"],
            "message": outcome["message"],
            "best_epoch": outcome["best_epoch"]["plain"],
            "compiled": outcome["compiled"],
            **({"adopted": adopted} if adopted else {}),
        },
    )
    return True


def track_outcome(run_dir: RunDirectory) -> None:
    """Logs the history and the files of a training that has ended, once. If MLflow fails, it warns."""
    saved, outcome, folder = run_dir.load("run"), run_dir.load("outcome"), run_dir.local_dir.parent.parent
    if saved.get("is_tracked"):
        return
    run_id, run_name = saved["mlflow_run_id"], outcome["configuration"]["run"]
    files = [folder / WEIGHTS_FILES[name] for name in outcome["weights"]] + [folder / "config.yaml"]

    def log() -> None:
        from pipeline import track

        track.log_epochs(run_id, outcome["history"])  # those missing after an interruption
        track.log_results(run_id, {}, files)
        track.end_run(run_id, outcome["status"])

    failure = (
        f"{run_name} is trained, but MLflow does not have its outcome: `python -m stages.train {run_name}` logs it, "
        "without training again"
    )
    if try_tracking(log, failure):
        run_dir.save_status(run_id, outcome["status"], is_tracked=True)


def try_tracking(log: Callable[[], None], failure: str) -> bool:
    """Calls a function that logs to MLflow, and repeats it a few times if it fails. Returns whether it succeeded.

    An error is a warning only, because a tracking server must not end a training, or lose one that has ended.

    Args:
        failure: the warning. The error is added to it.
    """
    message = ""
    for wait_s in _UPLOAD_WAITS_S:
        try:
            log()
            return True
        except Exception as error:  # of MLflow, of its database, of HTTP or of the artifacts' storage
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            time.sleep(wait_s)
    logger.warning("%s (%s)", failure, message)
    return False


def _copy_weights(run_dir: RunDirectory, entry: Mapping[str, Any] | None, target: Path) -> bool:
    """Copies a file of weights, or writes one without tensors. Returns False if the file is not as its entry says."""
    from pyarrow.fs import LocalFileSystem, copy_files
    from safetensors.numpy import save_file

    target.parent.mkdir(parents=True, exist_ok=True)
    if entry is None:
        save_file({}, target)
        return True
    files, path = open_filesystem(f"{run_dir.checkpoints_location}/{entry['file']}")
    try:
        copy_files(path, str(target.absolute()), source_filesystem=files, destination_filesystem=LocalFileSystem())
    except OSError:
        return False
    return checksum_file(target) == entry["xxh3"]
